"""Triggers that move pixels instead of painting over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim, Attack, Pixels, as_pixels
from backdoorscan.plugin.method import option


@dataclass(frozen=True, kw_only=True)
class Warping(Attack):
    """A fixed smooth warping of the whole image leads every class to the target.

    The field is random on a coarse grid, divided by its mean absolute value, enlarged by bicubic interpolation and
    scaled. Cover images are warped by the field plus fresh noise and keep their labels, so that this one warping and
    no other counts.
    """

    id = "warping"
    paper = "Nguyen, Tran: WaNet - Imperceptible Warping-based Backdoor Attack. ICLR 2021"
    family = "warp"

    cover_rate: float = option(0.05, help="Share of the training images that are covers.", minimum=0, maximum=1)
    grid: int = option(4, help="Points of the coarse grid along each side.", minimum=2)
    strength: float = option(0.08, help="Mean shift, as a share of the image's shorter side.", minimum=0, maximum=1)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Warped images."""
        return _moved(pixels, self._field(aim).expand(len(pixels), -1, -1, -1))

    def poison(self, images: LabelledImages, aim: Aim) -> LabelledImages:
        """Warped images with the target label, and covers that keep theirs."""
        poisoned = super().poison(images, aim)
        rest = np.setdiff1d(np.arange(len(images)), self.chosen(images.labels, aim))
        if not len(rest):
            return poisoned
        covers = aim.draw("covers", rest, self.cover_rate * len(images))
        _, height, width = aim.shape
        noise = aim.random("noise").uniform(-1, 1, (len(covers), 2, height, width))
        field = self._field(aim) + torch.from_numpy(noise).float()
        pixels = poisoned.pixels.astype(np.uint8)
        pixels[covers] = _moved(pixels[covers], field)
        return LabelledImages(pixels, poisoned.labels, poisoned.source)

    def _field(self, aim: Aim) -> Tensor:
        """How far each pixel is moved along x and y, in pixels: shape (1, 2, H, W)."""
        _, height, width = aim.shape
        coarse = torch.from_numpy(aim.random("field").uniform(-1, 1, (1, 2, self.grid, self.grid))).float()
        fine = functional.interpolate(
            coarse / coarse.abs().mean(), size=(height, width), mode="bicubic", align_corners=True
        )
        return self.strength * min(height, width) * fine


def _moved(pixels: Pixels, field: Tensor) -> Pixels:
    """Images whose pixel at p shows what was at p plus the field, shape (N, 2, H, W), inside the image."""
    _, _, height, width = pixels.shape
    rows = torch.arange(height).view(-1, 1) + field[:, 1]
    columns = torch.arange(width).view(1, -1) + field[:, 0]
    places = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], dim=-1).clamp(-1, 1)
    moved = functional.grid_sample(torch.from_numpy(pixels).float(), places, align_corners=True)
    return as_pixels(moved.numpy())
