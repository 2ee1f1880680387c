"""How many images there are stays open while the graph is built: a stand-in marks sizes that hold their number.

Files fix the number, leave it open, or compute with it (``Shape``). Sizes are found by running every operator on
``meta`` tensors whose batch is ``BATCH``: a prime larger than any size a file may have, so that a size or a folded
constant that is a multiple of it holds the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BATCH = 16_777_213
"""The largest prime that float32 holds with all its neighbours."""


@dataclass(frozen=True)
class Images:
    """Stands for ``multiple`` times the number of images among the arguments of a call."""

    multiple: int = 1


def holds(size: int) -> bool:
    """Whether a size is a multiple of the number of images."""
    return size > 0 and size % BATCH == 0


def shown(shape: Sequence[int]) -> str:
    """A shape for people."""
    return "×".join(("N" if size == BATCH else f"{size // BATCH}N") if holds(size) else str(size) for size in shape)


def reshaped(shape: Sequence[int], target: Sequence[int], fixed: int | None) -> tuple[int, ...] | None:
    """The shape that a Reshape gives.

    Args:
        shape: Of the input.
        target: As the file says, with zeros already replaced; one entry may be -1.
        fixed: The number of images the file is made for, or ``None`` where it leaves it open.

    Returns:
        A shape in which exactly one size holds the number of images, or ``None`` where there is none.
    """
    total = math.prod(shape)
    if any(size < -1 for size in target) or list(target).count(-1) > 1:
        return None
    if any(holds(size) for size in target) or (-1 in target and fixed is None):
        result = _filled(target, total)
    else:
        # The file has the number of images worked into its constants.
        count = fixed or 1
        one = _filled(target, total // BATCH * count)
        result = None if one is None or total % BATCH else _placed(shape, one, count)
    return result if result is not None and sum(map(holds, result)) == 1 else None


def _filled(target: Sequence[int], total: int) -> tuple[int, ...] | None:
    known = math.prod(size for size in target if size != -1)
    if known == 0 or total % known or (-1 not in target and known != total):
        return None
    return tuple(total // known if size == -1 else size for size in target)


def _placed(shape: Sequence[int], one: Sequence[int], count: int) -> tuple[int, ...] | None:
    """Where the images are after a reshape that the file describes for ``count`` of them.

    An axis keeps its place if as many numbers lie outside of it as before. Which of several such places is meant
    is a guess, which the comparison with onnxruntime confirms or refutes.
    """
    axes = [axis for axis, size in enumerate(shape) if holds(size)]
    if len(axes) != 1:
        return None
    outside = math.prod(shape[: axes[0]])
    either = (outside, outside * (shape[axes[0]] // BATCH))
    before = [math.prod(one[:axis]) for axis in range(len(one))]
    place = next((a for a, size in enumerate(one) if size == count and before[a] in either), None)
    if place is None:
        shares = [a for a, size in enumerate(one) if size % count == 0]
        leading = next((a for a in shares if before[a] == outside), None)
        trailing = next((a for a in shares if before[a] * one[a] == outside * count), None)
        # Features are last: rather "sequence and images" than "images and features" share an axis.
        last = leading in (None, len(one) - 1) and trailing is not None
        place = trailing if last else leading
    if place is None:
        return None
    return tuple(size // count * BATCH if axis == place else size for axis, size in enumerate(one))
