"""A trigger: what is stamped on an image to send it to a target label."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Blend ``pattern`` into ``images``: ``(1 - mask) * x + mask * pattern``.

    Source: Wang et al. 2019, "Neural Cleanse", eq. 2.

    Args:
        images: Shape (..., C, H, W) in [0, 1].
        mask: Shape (..., 1, H, W) in [0, 1].
        pattern: Shape (..., C, H, W) in [0, 1].
    """
    return torch.lerp(images, pattern, mask.expand_as(pattern))


@dataclass(frozen=True, eq=False)
class Trigger:
    """A mask and a pattern in pixel space.

    Attributes:
        mask: Shape (1, H, W) in [0, 1]: how much of a pixel is replaced.
        pattern: Shape (C, H, W) in [0, 1]: what it is replaced with.
        target: The label it leads to.
    """

    mask: Tensor
    pattern: Tensor
    target: int

    def stamp(self, images: Tensor) -> Tensor:
        """The images (N, C, H, W) in [0, 1] with the trigger on them."""
        return stamp(images, self.mask, self.pattern)

    @property
    def l1(self) -> float:
        """L1 norm of the mask in pixels, 0 to H·W."""
        return float(self.mask.sum())

    @property
    def area(self) -> float:
        """The part of the image that the mask covers, 0 to 1."""
        return float(self.mask.mean())

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report: the figures, and mask and pattern packed as text."""
        return {
            "target": self.target,
            "l1": self.l1,
            "area": self.area,
            "mask": _pack(self.mask),
            "pattern": _pack(self.pattern),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trigger:
        """The inverse of ``to_json``."""
        return cls(_unpack(data["mask"]), _unpack(data["pattern"]), data["target"])


def _pack(tensor: Tensor) -> dict[str, Any]:
    array = tensor.detach().cpu().numpy().astype("<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()}


def _unpack(data: Mapping[str, Any]) -> Tensor:
    # No more is unpacked than the shape needs: a report may come from anywhere.
    shape = data["shape"]
    unpacked = zlib.decompressobj().decompress(base64.b64decode(data["float32"]), 4 * math.prod(shape) + 1)
    return torch.from_numpy(np.frombuffer(unpacked, "<f4").reshape(shape).astype(np.float32))
