"""Weights without an architecture: PyTorch state dicts, safetensors and Hugging Face folders, with ``--arch``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backdoorscan.plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from backdoorscan.plugin.loader import Loader


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The formats of this package."""
    # Imported here, so that the modules that read a file can be imported without torch.
    from backdoorscan.formats.weights.huggingface import HuggingFace
    from backdoorscan.formats.weights.loader import Safetensors, TorchStateDict

    return [Safetensors, TorchStateDict, HuggingFace]
