"""What a file of weights holds, as plain data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A stretch of a file, ``start`` to ``stop`` in bytes; ``file`` is its name in a folder, or empty."""

    start: int
    stop: int
    file: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: where its numbers lie and how they are laid out.

    Attributes:
        dtype: torch's name of the type, e.g. ``"float32"``; ``"sparse"`` for a tensor that is not read.
        shape: Its sizes.
        stride: Elements from one index to the next, per dimension.
        offset: Its first element, in elements from the beginning of ``storage``.
        storage: The bytes it lies in, little-endian; tensors with equal ones share their memory.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Span


@dataclass(frozen=True)
class StateDict:
    """One dictionary of tensors inside a checkpoint.

    Attributes:
        where: Keys and indices that lead to it from the root; empty where the checkpoint is the state dict.
        tensors: Its tensors by their name in the file.
    """

    where: tuple[str | int, ...]
    tensors: dict[str, TensorSpec]

    def __str__(self) -> str:
        return "".join(f"[{key!r}]" for key in self.where) or "the whole file"


@dataclass(frozen=True)
class ParsedWeights:
    """What a file holds of weights; the numbers themselves stay in the file.

    Attributes:
        holds: What its root is, in a word.
        states: Its dictionaries of tensors, the likeliest to be the weights first.
    """

    holds: str
    states: tuple[StateDict, ...]
