"""What an ONNX file says, as plain data that can go from one process to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

GOODNET = "backdoorscan.goodnet"
"""The entry of ``ParsedOnnx.metadata`` by which a GoodNet that this program wrote is known."""


@dataclass(frozen=True)
class Attribute:
    """One setting of an operator: ``type`` says which of the others holds it. All are named as in the format.

    Attributes:
        type: As ONNX numbers types of attributes.
        i: A whole number.
        f: A number.
        s: A word.
        t: An array.
        g: A part of the network that the operator runs, or not.
        ints: Whole numbers.
        floats: Numbers.
        strings: Words.
        ref_attr_name: The argument of a function that stands here.
    """

    type: onnx.AttributeProto.AttributeType
    i: int = 0
    f: float = 0.0
    s: bytes = b""
    t: NDArray[Any] | None = field(default=None, repr=False)
    g: Subgraph | None = field(default=None, repr=False)
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    strings: tuple[bytes, ...] = ()
    ref_attr_name: str = ""


@dataclass(frozen=True)
class Node:
    """One operator of the file.

    Attributes:
        op: Its type, e.g. ``"Conv"``.
        name: As the file gives it; may be empty.
        domain: Empty for the standard operators.
        inputs: Names of values; an empty one is an input left out.
        outputs: Likewise.
        attributes: Its settings.
        captured: Names of further values that its subgraphs use.
    """

    op: str
    name: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(repr=False)
    captured: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} '{self.name or next(iter(self.outputs), '')}'"


@dataclass(frozen=True)
class Subgraph:
    """A part of the network inside an operator, such as a branch of ``If``.

    Attributes:
        nodes: Those its outputs depend on, each behind what it needs.
        inputs: Names that the operator gives values to.
        outputs: Names of what it gives back.
        arrays: What it stores.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)


@dataclass(frozen=True)
class ImageInput:
    """The file's input.

    Attributes:
        name: Its name.
        batch: The number of images the file is fixed to, or ``None``.
        shape: Of one image in the file's order of axes; ``None`` where a size is open.
        element: Type of its elements, as ONNX numbers them.
    """

    name: str
    batch: int | None
    shape: tuple[int | None, ...]
    element: int


@dataclass(frozen=True)
class ParsedOnnx:
    """What a file says.

    Attributes:
        nodes: In the file's order; only those the scores depend on.
        input: The image.
        output: Name of the scores.
        opset: Version of the standard operators.
        size: Bytes of the file and its companions.
        producer: What wrote the file, as it says itself.
        metadata: Further texts of the file.
        halves: Whether it stores numbers of 16 bits.
    """

    nodes: tuple[Node, ...] = field(repr=False)
    input: ImageInput
    output: str
    opset: int
    size: int
    producer: str
    metadata: Mapping[str, str] = field(repr=False)
    halves: bool
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)

    def initializers(self) -> set[str]:
        """Names of the arrays that the file stores and its scores depend on."""
        return set(self.arrays)

    def stored(self, name: str) -> NDArray[Any]:
        """An array as the file stores it; not to be changed."""
        return self.arrays[name]
