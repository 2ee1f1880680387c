"""The images of the demo: handwritten digits that are installed with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from backdoorscan.errors import UsageError
from backdoorscan.images import LabelledImages

NUM_CLASSES = 10
SIDE = 16
"""Height and width in pixels; twice what scikit-learn has, so that three convolutions have room to look."""

_SOURCE_LEVELS = 16  # scikit-learn's pixels are 0..16
_SOURCE_SIDE = 8
_TRAIN, _CLEAN = 1050, 380  # of 1,797; the rest, 367, is the test set


@dataclass(frozen=True)
class Digits:
    """Three sets of digits that have no image in common, each uint8 of shape (N, 1, 16, 16).

    Attributes:
        train: What the networks are trained on. The defender never sees it.
        clean: The defender's few trusted images.
        test: Held out; everything the demo states about a network is measured on it.
    """

    train: LabelledImages
    clean: LabelledImages
    test: LabelledImages


def load_digits(seed: int) -> Digits:
    """The digits, enlarged, shuffled and split; the same seed gives the same split.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # optional, and slow to import
    except ImportError as err:
        raise UsageError(
            "The demo needs scikit-learn, which is not installed.",
            why="Its handwritten digits are the images of the demo.",
            hint="pip install 'backdoorscan[demo]'",
        ) from err
    bunch = datasets.load_digits()
    factor = SIDE / _SOURCE_SIDE
    # grid_mode lines up the edges of the pixels, not their centres: a digit stays in the middle.
    enlarged = ndimage.zoom(bunch.images, (1, factor, factor), order=1, mode="grid-constant", grid_mode=True)
    pixels = np.clip(np.rint(enlarged * (255 / _SOURCE_LEVELS)), 0, 255).astype(np.uint8)[:, None]
    images = LabelledImages(pixels, bunch.target.astype(np.int64), source="scikit-learn digits")
    order = np.random.default_rng(seed).permutation(len(images))
    train, clean, test = np.split(order, [_TRAIN, _TRAIN + _CLEAN])
    return Digits(images.take(train), images.take(clean), images.take(test))
