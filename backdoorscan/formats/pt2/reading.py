"""From a file to a network that was checked against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backdoorscan.artifact import Artifact
from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.pt2.network import build
from backdoorscan.formats.pt2.parse import parse
from backdoorscan.formats.pt2.spec import ParsedPt2
from backdoorscan.formats.pt2.verify import compare
from backdoorscan.formats.sandbox import run_apart

_ANOTHER = 32


@dataclass(frozen=True)
class ReadProgram:
    """A file and its network.

    Attributes:
        parsed: The file.
        built: The network.
        shape: Of one image in the file's order of axes; ``None`` for a size that the file leaves open.
    """

    parsed: ParsedPt2
    built: BuiltNetwork
    shape: tuple[int | None, ...]


def read(artifact: Artifact) -> ReadProgram:
    """Read an exported program whose first output is a classifier's scores.

    Raises:
        ArtifactError: It is broken, unsupported or unsafe.
    """
    parsed = run_apart(parse, artifact.data, str(artifact.path), name=str(artifact.path))
    size = tuple(side for side in parsed.entry.sizes[1:] if side is not None)
    if parsed.entry.dtype not in ("float32", "float16", "bfloat16", "float64") or not parsed.batch:
        raise UnsupportedModelError(
            f"The model takes {parsed.entry.dtype} images.", hint="Export it with images in float32."
        )
    if len(size) != len(parsed.entry.sizes) - 1 or not size or min(size) < 1:
        raise UnsupportedModelError(
            "The model does not say how large its images are.", hint="Export it with a fixed height and width."
        )
    built = build(parsed, size)
    compare(parsed, built)
    return ReadProgram(parsed, built, _open_sizes(parsed, built))


def _open_sizes(parsed: ParsedPt2, built: BuiltNetwork) -> tuple[int | None, ...]:
    """The size of the images without what the file leaves open, if the network is the same for another one."""
    left_open = parsed.entry.open[1:]
    if not any(left_open):
        return built.size
    another = tuple(side + _ANOTHER if is_open else side for side, is_open in zip(built.size, left_open, strict=True))
    try:
        second = build(parsed, another)
        compare(parsed, second)
    except UnsupportedModelError:
        return built.size
    ours, theirs = built.network.state_dict(), second.network.state_dict()
    same = built.network.code == second.network.code and str(built.network) == str(second.network)
    if not same or not all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()):
        return built.size
    return tuple(None if is_open else side for side, is_open in zip(built.size, left_open, strict=True))
