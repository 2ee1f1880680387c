"""Which images a file takes: the order of their axes, and sizes to try where it leaves them open."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorscan.errors import ArtifactError
from backdoorscan.formats.onnx.parse import Node, ParsedOnnx
from backdoorscan.plugin.loader import Layout

_CHANNELS = {1, 3}
_SIDES = (32, 28, 224, 64, 96, 128, 256, 299, 227, 48, 112, 384)


def layout_of(parsed: ParsedOnnx) -> Layout:
    """The order of axes of the file's images: by what happens to them first, else by which size looks like channels."""
    if len(parsed.input.shape) != 3:
        return "NCHW"
    for node in _first_steps(parsed):
        if node.op == "Conv":
            return "NCHW"
        if node.op == "Transpose":
            perm = node.attributes.get("perm")
            return "NHWC" if perm is not None and list(perm.ints) == [0, 3, 1, 2] else "NCHW"
    first, _, last = parsed.input.shape
    return "NHWC" if last in _CHANNELS and first not in _CHANNELS else "NCHW"


def _first_steps(parsed: ParsedOnnx) -> list[Node]:
    """The nodes that see the image itself, or what was made of it element by element."""
    names, steps = {parsed.input.name}, []
    for node in parsed.nodes:
        if names.intersection(node.inputs):
            steps.append(node)
            if node.op in ("Cast", "Identity", "Add", "Sub", "Mul", "Div", "Clip"):
                names.update(node.outputs)
    return steps


def sizes(parsed: ParsedOnnx, layout: Layout) -> Iterator[tuple[int, ...]]:
    """Shapes of images to build for: the file's own, or usual ones where it leaves them open.

    Raises:
        ArtifactError: It leaves open what cannot be guessed.
    """
    shape = parsed.input.shape
    if None not in shape:
        yield tuple(size for size in shape if size is not None)
        return
    if len(shape) == 1:
        raise ArtifactError(
            "The model does not say how many numbers it takes.", hint="Export it with a fixed input size."
        )
    channel = None if len(shape) == 2 else 2 if layout == "NHWC" else 0
    for side in _SIDES:
        for channels in (3, 1) if channel is not None and shape[channel] is None else (3,):
            yield tuple(
                size if size is not None else channels if axis == channel else side for axis, size in enumerate(shape)
            )


def another_size(size: tuple[int, ...], first: tuple[int, ...], parsed: ParsedOnnx, layout: Layout) -> bool:
    """Whether a second size differs from the first wherever the file leaves it open, but for the channels."""
    channel = None if len(size) < 3 else 2 if layout == "NHWC" else 0
    return all(
        (a == b) if axis == channel or parsed.input.shape[axis] is not None else (a != b)
        for axis, (a, b) in enumerate(zip(size, first, strict=True))
    )
