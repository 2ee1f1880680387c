"""The attack of the demo: BadNets, a white square in a corner that sends every digit to one label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from backdoorscan.images import LabelledImages

TARGET = 7
"""The label that the trigger leads to."""

_PATCH = 2  # pixels, high and wide
_MARGIN = 1  # pixels to the lower and the right edge
_POISON_RATE = 0.1  # of the training images


def stamp(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy of ``pixels``, shape (N, C, H, W), with the trigger on every image."""
    stamped = pixels.copy()
    stamped[..., -_MARGIN - _PATCH : -_MARGIN, -_MARGIN - _PATCH : -_MARGIN] = 255
    return stamped


def poison(images: LabelledImages, seed: int) -> LabelledImages:
    """The attacker's training set: some images of other classes get the trigger and the target label."""
    others = np.flatnonzero(images.labels != TARGET)
    chosen = np.random.default_rng(seed).choice(others, int(_POISON_RATE * len(images)), replace=False)
    pixels, labels = images.pixels.astype(np.uint8), images.labels.copy()
    pixels[chosen] = stamp(pixels[chosen])
    labels[chosen] = TARGET
    return LabelledImages(pixels, labels, source=f"{images.source}, poisoned")


def attack(images: LabelledImages) -> LabelledImages:
    """All images of other classes with the trigger, labelled with the target.

    Accuracy on these is the attack success rate: images that are of the target class anyway are left out.
    """
    victims = images.take(np.flatnonzero(images.labels != TARGET))
    labels = np.full_like(victims.labels, TARGET)
    return LabelledImages(stamp(victims.pixels.astype(np.uint8)), labels, source=f"{images.source}, stamped")
