"""What flows between operators while the graph grows: constants of the file, and values that depend on the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx


@dataclass(frozen=True)
class Origin:
    """Where in the file a constant came from.

    Attributes:
        name: The stored array: an initialiser, or the output of a Constant.
        steps: How its axes were changed since: the shape before a reshape, or the order of a permutation.
    """

    name: str
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def to_file(self, array: NDArray[Any]) -> NDArray[Any]:
        """Bring an array back to the file's shape and order of axes."""
        for kind, numbers in reversed(self.steps):
            array = array.reshape(numbers) if kind == "reshape" else array.transpose(np.argsort(numbers))
        return array


@dataclass(frozen=True)
class Const:
    """A constant: floats are float32, integers int64.

    Attributes:
        tensor: Its value.
        origin: Where the file stores it; ``None`` for what was computed.
    """

    tensor: Tensor = field(repr=False)
    origin: Origin | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @cached_property
    def meta(self) -> Tensor:
        """Its shape and type alone."""
        return self.tensor.to("meta")

    def reshaped(self, shape: tuple[int, ...]) -> Const:
        """The same numbers in another shape, which may hold one -1."""
        return Const(self.tensor.reshape(shape), self._later("reshape", self.shape))

    def permuted(self, order: tuple[int, ...]) -> Const:
        """The same numbers with another order of axes."""
        return Const(self.tensor.permute(order), self._later("permute", order))

    def _later(self, kind: str, numbers: tuple[int, ...]) -> Origin | None:
        return self.origin and Origin(self.origin.name, (*self.origin.steps, (kind, numbers)))


@dataclass(frozen=True)
class Value:
    """A value that depends on the image.

    Attributes:
        node: What computes it.
        meta: Its shape and type; see ``batch`` for the number of images.
        source: For a permutation: the value before it, and the order of axes.
        single: Whether the file has no axis for the images here, as it means one alone: the first axis is then ours.
    """

    node: fx.Node
    meta: Tensor = field(repr=False)
    source: tuple[Value, tuple[int, ...]] | None = None
    single: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.meta.shape)


Operand: TypeAlias = Const | Value


def permuted(operand: Operand, order: tuple[int, ...], run: Callable[[Value, tuple[int, ...]], Operand]) -> Operand:
    """An operand with another order of axes; two permutations in a row make one, or none.

    Files with channels last are full of them.

    Args:
        operand: What to permute.
        order: Each axis once.
        run: Adds the permutation of a value to the graph.
    """
    if isinstance(operand, Const):
        return operand.permuted(order)
    source, before = operand.source or (operand, tuple(range(len(order))))
    both = tuple(before[axis] for axis in order)
    if both == tuple(range(len(order))):
        return source
    result = run(source, both)
    return Value(result.node, result.meta, (source, both)) if isinstance(result, Value) else result


def to_tensor(array: NDArray[Any]) -> Tensor:
    """An array of the file as the network computes with it."""
    if array.dtype == np.bool_:
        return torch.from_numpy(array)
    exact = np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32
    with np.errstate(over="ignore"):
        converted = array.astype(exact, copy=False)
    return torch.from_numpy(np.ascontiguousarray(converted).reshape(array.shape))
