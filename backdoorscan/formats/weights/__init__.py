"""Weights without an architecture: PyTorch state dicts and safetensors, with the architecture from ``--arch``."""

from collections.abc import Sequence

from backdoorscan.formats.weights.loader import Safetensors, TorchStateDict
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import Loader

__all__ = ["Safetensors", "TorchStateDict"]


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The formats of this package."""
    return [Safetensors, TorchStateDict]
