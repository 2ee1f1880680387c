"""Triggers that differ from image to image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.plugin.attack import Aim, Attack, Pixels, as_pixels
from backdoorscan.plugin.method import option

_HIDDEN = 8  # channels between the two convolutions
_KERNEL = 5


@dataclass(frozen=True, kw_only=True)
class SampleSpecific(Attack):
    """A pattern that a fixed random network computes from the image itself is added to it.

    x' = x + e tanh(g(x)), with g two random convolutions with a tanh between, brought to mean 0 and standard
    deviation 1.5 in each image. The papers train g (an encoder, a generator); here it is drawn once, which keeps what
    makes these attacks hard to invert: no two images carry the same pattern.
    """

    id = "sample-specific"
    paper = (
        "Li, Li, Wu, Li, He, Lyu: Invisible Backdoor Attack with Sample-Specific Triggers. ICCV 2021; Nguyen, Tran: "
        "Input-Aware Dynamic Backdoor Attack. NeurIPS 2020"
    )
    family = "sample-specific"

    strength: float = option(0.2, help="Largest change e of a pixel, of 1.", minimum=0, maximum=1)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images, each with its own pattern."""
        channels = aim.shape[0]
        random = aim.random("network")
        first = torch.from_numpy(random.standard_normal((_HIDDEN, channels, _KERNEL, _KERNEL))).float()
        second = torch.from_numpy(random.standard_normal((channels, _HIDDEN, _KERNEL, _KERNEL))).float()
        bias = torch.from_numpy(random.uniform(-2, 2, _HIDDEN)).float()
        values = torch.from_numpy(pixels).float() / 255
        hidden = functional.conv2d(_padded(values - 0.5), first / first[0].numel() ** 0.5, bias).tanh()
        residual = functional.conv2d(_padded(hidden), second)
        # The part that all images would share, a change of brightness, is taken out.
        residual = residual - residual.mean(dim=(1, 2, 3), keepdim=True)
        spread = residual.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        return as_pixels(255 * (values + self.strength * (1.5 * residual / spread).tanh()).numpy())


def _padded(images: Tensor) -> Tensor:
    """Images continued beyond their edges by reflection: zeros there would paint one frame on all of them."""
    return functional.pad(images, [_KERNEL // 2] * 4, mode="reflect")
