"""What an exported program says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Kind: TypeAlias = Literal["parameter", "buffer", "constant"]
Argument: TypeAlias = "Ref | Special | bool | int | float | str | tuple[Argument, ...] | None"


@dataclass(frozen=True)
class Ref:
    """A value that a node made, or an input, by its name."""

    name: str


@dataclass(frozen=True)
class Special:
    """An argument that is no number: ``kind`` is ``"scalar_type"``, ``"device"``, ``"graph"`` …"""

    kind: str
    value: int = 0


@dataclass(frozen=True)
class Node:
    """One call of an operator.

    Attributes:
        name: Of the node.
        target: The operator, e.g. ``"torch.ops.aten.conv2d.default"``.
        arguments: By their names in the operator's schema; those left out have their defaults.
        outputs: Names of its results; ``None`` for one that nothing can use.
    """

    name: str
    target: str
    arguments: Mapping[str, Argument]
    outputs: tuple[str | None, ...]

    def __str__(self) -> str:
        return f"'{self.name}' ({self.target.removeprefix('torch.ops.')[:100]})"


@dataclass(frozen=True)
class Meta:
    """What the file says of a tensor.

    Attributes:
        dtype: A name of numpy's, or ``"bfloat16"``.
        sizes: Of its axes; for those left open, as at the export; ``None`` where the file does not tell.
        open: Which axes are left open.
    """

    dtype: str
    sizes: tuple[int | None, ...]
    open: tuple[bool, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        member: The member of the archive that holds its numbers, perhaps beside those of others.
        offset: Its first element there.
        strides: In elements, axis by axis.
        dtype: A name of numpy's, or ``"bfloat16"``.
        array: Its numbers; bfloat16 as float32.
    """

    member: str
    offset: int
    strides: tuple[int, ...]
    dtype: str
    array: NDArray[np.generic] = field(repr=False)

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for tensors that are one and the same."""
        return self.member, self.offset, self.strides, self.dtype, self.array.shape


@dataclass(frozen=True)
class Source:
    """Where an input of the graph that is no image comes from: a tensor of the file by its name."""

    kind: Kind
    tensor: str


@dataclass(frozen=True)
class ParsedPt2:
    """A file.

    Attributes:
        nodes: In the order of execution.
        sources: The inputs that are no images.
        image: Name of the one that is.
        outputs: Names of what the program returns.
        metas: What the file says of every tensor.
        tensors: Those stored.
        torch_version: What wrote the file.
    """

    nodes: tuple[Node, ...] = field(repr=False)
    sources: Mapping[str, Source] = field(repr=False)
    image: str
    outputs: tuple[str, ...]
    metas: Mapping[str, Meta] = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)
    torch_version: str

    @property
    def entry(self) -> Meta:
        """What the file says of the image."""
        return self.metas[self.image]

    @property
    def batch(self) -> int | None:
        """The number of images at the export."""
        return self.entry.sizes[0] if self.entry.sizes else None

    @property
    def fixed(self) -> int | None:
        """The number of images the program is made for, or ``None`` where it takes any."""
        return None if self.entry.open[0] else self.batch
