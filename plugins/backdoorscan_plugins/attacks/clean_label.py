"""Patches on images of the target class alone: every label of the training set is right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim, Attack, Index, Labels, Pixels, as_pixels, checked
from backdoorscan.plugin.method import option
from backdoorscan_plugins.attacks.patch import SIZE_HELP, draw_patch, side_in_pixels


@dataclass(frozen=True, kw_only=True)
class CleanLabel(Attack):
    """Images of the target class are made hard to recognise and get patches in all four corners; labels stay.

    As its own features are washed out, the network has to learn such an image by its patches. The paper moves images
    towards another class by a generative model or an adversarial perturbation; here another class's image is
    blended in, x' = (1 - a) x + a x_other, which needs no second network.
    """

    id = "clean-label"
    paper = "Turner, Tsipras, Madry: Label-Consistent Backdoor Attacks. 2019"
    family = "clean-label"

    rate: float = option(0.6, help="Share of the target class's images that carry the patches.", minimum=0, maximum=1)
    size: float = option(0.14, help=SIZE_HELP, minimum=0, maximum=0.5)
    weakening: float = option(0.75, help="Part a of another class's image.", minimum=0, maximum=1)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the four patches."""
        for corner in range(4):
            pixels = draw_patch(pixels, aim, side_in_pixels(self.size, aim), corner)
        return pixels

    def chosen(self, labels: Labels, aim: Aim) -> Index:
        """Images of the target class."""
        members = np.flatnonzero(labels == aim.target)
        return aim.draw("poisoned", members, self.rate * len(members))

    def poison(self, images: LabelledImages, aim: Aim) -> LabelledImages:
        """Weakened images of the target class with the patches; all labels stay."""
        pixels, others = checked(images, aim), self._require_victims(images, aim)
        chosen = self.chosen(images.labels, aim)
        partners = aim.random("partners").choice(others, len(chosen))
        pixels[chosen] = as_pixels((1 - self.weakening) * pixels[chosen] + self.weakening * pixels[partners])
        return super().poison(replace(images, pixels=pixels, sha256=""), aim)
