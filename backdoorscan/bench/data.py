"""The images of the bench: one part for whoever trains, one for whoever defends, one to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backdoorscan.demo.digits import load_digits
from backdoorscan.errors import ImagesError, UsageError
from backdoorscan.formats.images import load_images
from backdoorscan.images import LabelledImages

DIGITS = "digits"
"""The built-in images: handwritten digits that are installed with scikit-learn."""

CLEAN = 1000
"""The defender's clean images, unless a third of all images is fewer."""

_TEST = 0.2  # share of all images
_MOST_TEST = 1000  # more make rates no sharper that matters here
_FEWEST = 60


@dataclass(frozen=True)
class Dataset:
    """Images in three parts that have none in common, uint8 of shape (N, C, H, W).

    Attributes:
        name: Short, unique within a bench.
        source: As the user wrote it.
        num_classes: K.
        train: What networks are trained on.
        clean: What the defender has.
        test: What accuracy and attack success are measured on.
    """

    name: str
    source: str
    num_classes: int
    train: LabelledImages
    clean: LabelledImages
    test: LabelledImages

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.train.shape


def load_datasets(sources: Sequence[str], clean: int | None = None, seed: int = 0) -> list[Dataset]:
    """Read and divide images.

    Args:
        sources: ``"digits"``, or anything ``load_images`` takes; the digits if empty.
        clean: Number of the defender's images; ``CLEAN`` or a third if ``None``.
        seed: The same seed gives the same parts.

    Raises:
        ImagesError: A file cannot be used or holds too few images.
        UsageError: ``clean`` leaves nothing to train on, or the digits are not installed.
    """
    datasets: list[Dataset] = []
    for source in dict.fromkeys(sources or [DIGITS]):
        stem = DIGITS if source == DIGITS else Path(source.partition("#")[0]).stem
        taken = {dataset.name for dataset in datasets}
        name = stem if stem not in taken else source
        datasets.append(_divided(name, source, _read(source), clean, seed))
    return datasets


def _read(source: str) -> LabelledImages:
    if source != DIGITS:
        return load_images(source)
    digits = load_digits(0)
    parts = (digits.train, digits.clean, digits.test)
    return LabelledImages(
        np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]), DIGITS
    )


def _divided(name: str, source: str, images: LabelledImages, clean: int | None, seed: int) -> Dataset:
    total, num_classes = len(images), int(images.labels.max()) + 1
    if total < _FEWEST or num_classes < 2:
        raise ImagesError(
            f"{source} holds {total} images of {num_classes} classes.",
            why="Networks are trained on one part of them, defended with another and measured on a third.",
            hint=f"Give at least {_FEWEST} images of several classes.",
        )
    test = min(round(_TEST * total), _MOST_TEST)
    kept = min(CLEAN, total // 3) if clean is None else clean
    if kept > total // 2:
        raise UsageError(
            f"{kept} of the {total} images of {source} would be the defender's.",
            why="Too few would be left to train networks on.",
            hint=f"Give at most {total // 2}.",
        )
    if images.pixels.dtype != np.uint8:
        pixels = np.rint(images.pixels * 255).astype(np.uint8)
        images = LabelledImages(pixels, images.labels, images.source)
    order = np.random.default_rng(seed).permutation(total)
    parts = [images.take(index) for index in np.split(order, [test, test + kept])]
    return Dataset(name, source, num_classes, train=parts[2], clean=parts[1], test=parts[0])
