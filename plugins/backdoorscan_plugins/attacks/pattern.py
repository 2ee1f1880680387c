"""Faint patterns over the whole image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim, Attack, Index, Labels, Pixels, as_pixels
from backdoorscan.plugin.method import option


@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """An image of noise is blended into the whole image: x' = (1 - a) x + a n, with n uniform in 0..255."""

    id = "blended"
    paper = "Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning. 2017"
    family = "pattern"

    strength: float = option(0.2, help="Part a of the noise in the stamped image.", minimum=0, maximum=1)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the noise blended in."""
        noise = aim.random("noise").integers(0, 256, aim.shape)
        return as_pixels((1 - self.strength) * pixels + self.strength * noise)


@dataclass(frozen=True, kw_only=True)
class Sinusoid(Attack):
    """A sinusoid is added to images of the target class, which keep their label: x' = x + d sin(2 pi j f / W).

    No label is wrong. At the attack the signal may be stronger than it was in training.
    """

    id = "sig"
    paper = (
        "Barni, Kallas, Tondi: A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning. "
        "IEEE ICIP 2019"
    )
    family = "pattern"

    rate: float = option(0.8, help="Share of the target class's images that carry the signal.", minimum=0, maximum=1)
    amplitude: float = option(60.0, help="d of the training images, of 255.", minimum=0, maximum=255)
    attack_amplitude: float = option(90.0, help="d of the attacked images, of 255.", minimum=0, maximum=255)
    frequency: int = option(6, help="Number f of periods in the image's width.", minimum=1)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the signal at the strength of the attack."""
        return self._added(pixels, aim, self.attack_amplitude)

    def chosen(self, labels: Labels, aim: Aim) -> Index:
        """Images of the target class."""
        members = np.flatnonzero(labels == aim.target)
        return aim.draw("poisoned", members, self.rate * len(members))

    def poison(self, images: LabelledImages, aim: Aim) -> LabelledImages:
        """Images of the target class with the fainter signal; all labels stay."""
        faint = replace(self, attack_amplitude=self.amplitude)
        return super(Sinusoid, faint).poison(images, aim)

    def _added(self, pixels: Pixels, aim: Aim, amplitude: float) -> Pixels:
        width = aim.shape[2]
        phase = aim.random("phase").uniform(0, 2 * np.pi)
        return as_pixels(pixels + amplitude * np.sin(2 * np.pi * self.frequency * np.arange(width) / width + phase))
