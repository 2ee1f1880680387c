"""How much a file can make the reader compute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from backdoorscan.errors import UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.building.batch import BATCH, holds

_MAX_VALUE = 2**27
_MAX_VALUES = 2**30
_MAX_FOLDED = 2**20


class Limits:
    """Keeps what a file can make us compute in proportion to what it holds.

    Args:
        stored: Elements of the file's arrays.
    """

    def __init__(self, stored: int) -> None:
        self._folding = 4 * stored + 16 * _MAX_FOLDED
        self._values = 0

    def fold(self, node: object, result: Tensor, operands: Sequence[Tensor]) -> None:
        """Allow a constant to be computed from others."""
        size = result.numel()
        self._folding -= size
        if self._folding < 0 or size > max(_MAX_FOLDED, sum(tensor.numel() for tensor in operands)):
            self._refuse(node, f"It makes a constant of {size:,} numbers from a few.")

    def image(self, size: Sequence[int]) -> None:
        """Allow images of a size."""
        if math.prod(size) > _MAX_VALUE:
            raise UnsafeModelError(
                f"The model was refused: it takes images of the shape {list(size)}.",
                why="No real network does.",
                hint="Do not use this file.",
            )

    def value(self, node: object, result: Tensor) -> None:
        """Allow a value to be computed for every image."""
        if sum(map(holds, result.shape)) != 1:
            raise UnsupportedModelError(
                f"The operator {node} cannot be read.",
                why="It does not treat every image by itself.",
                hint="If the model was exported for a fixed number of images, export it with a dynamic batch.",
            )
        size = result.numel() // BATCH
        self._values += size
        if size > _MAX_VALUE or self._values > _MAX_VALUES:
            self._refuse(node, f"It computes {size:,} numbers for one image.")

    def _refuse(self, node: object, why: str) -> None:
        raise UnsafeModelError(
            f"The model was refused: its operator {node} needs more memory than any real network's.",
            why=why,
            hint="Do not use this file.",
        )
