"""Labelled images: what the user trusts (``--valid``) or knows to be poisoned (``--poisoned``)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ImagesError

Array: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


def balanced_sample(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.intp]:
    """Which images to take, so that no class has two more than another that still has some left.

    Args:
        labels: Shape (N,).
        count: How many to take; all, if there are no more.
        seed: The same seed gives the same sample.

    Returns:
        Shape (min(count, N),), ascending.

    Raises:
        ImagesError: ``count`` is not positive.
    """
    if count < 1:
        raise ImagesError(f"A sample of {count} images was asked for.", hint="Ask for at least one.")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ordered = labels[by_class]
    turn = np.arange(len(labels)) - np.searchsorted(ordered, ordered)  # an image's place within its own class
    # First every class's first, then every class's second ...; chance decides which classes the last turn reaches.
    ranked = by_class[np.lexsort((random.random(len(labels)), turn))]
    return np.sort(ranked[:count])


@dataclass(frozen=True)
class LabelledImages:
    """Images in pixel space with their labels.

    Attributes:
        pixels: Shape (N, C, H, W); uint8 in 0..255 or float32 in [0, 1].
        labels: Shape (N,), int64, each at least 0.
        source: Where they came from, as the user wrote it.
        sha256: Digest of pixels and labels, the same whatever file format carried them.
    """

    pixels: Array
    labels: npt.NDArray[np.int64]
    source: str
    sha256: str = ""

    def __post_init__(self) -> None:
        """Check the arrays and fill in the digest.

        Raises:
            ImagesError: Empty, wrong rank, type or range, a negative label, or counts that differ.
        """
        if self.pixels.ndim != 4 or self.pixels.size == 0:
            raise ImagesError(f"{self.source} holds no images.", why=f"The array has shape {self.pixels.shape}.")
        if self.labels.shape != (len(self.pixels),):
            raise ImagesError(
                f"{self.source}: {len(self.pixels)} images but labels of shape {self.labels.shape}.",
                hint="Give one label per image.",
            )
        if self.labels.min() < 0:
            raise ImagesError(f"{self.source}: label {self.labels.min()} is negative.", hint="Labels count from 0.")
        if self.pixels.dtype not in (np.uint8, np.float32):
            raise ImagesError(f"{self.source}: pixels are {self.pixels.dtype}, not uint8 or float32.")
        # Written so that NaN, which compares false with everything, does not pass.
        if self.pixels.dtype == np.float32 and not (self.pixels.min() >= 0 and self.pixels.max() <= 1):
            raise ImagesError(f"{self.source}: pixel values are not within [0, 1].")
        if not self.sha256:
            digest = hashlib.sha256(repr((self.pixels.shape, self.pixels.dtype.str)).encode())
            digest.update(np.ascontiguousarray(self.pixels).data)
            digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
            object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def described(self) -> dict[str, Any]:
        """The images' part of a report."""
        return {"path": self.source, "sha256": self.sha256, "count": len(self)}

    def take(self, index: npt.NDArray[np.intp]) -> LabelledImages:
        """The images at ``index``, shape (M,), in that order."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], sha256="")

    def sample(self, count: int, seed: int) -> LabelledImages:
        """At most ``count`` images, as evenly over the classes as they allow, in their original order.

        The same seed gives the same sample.

        Raises:
            ImagesError: ``count`` is not positive.
        """
        index = balanced_sample(self.labels, count, seed)
        return self if len(index) == len(self) else self.take(index)

    def check_fits(self, num_classes: int) -> None:
        """Check the labels against a model.

        Raises:
            ImagesError: A label that the model has no output for.
        """
        highest = int(self.labels.max())
        if highest >= num_classes:
            raise ImagesError(
                f"{self.source}: label {highest} does not exist in a model of {num_classes} classes.",
                why=f"Labels must be 0 to {num_classes - 1}.",
                hint="Check that these are the images this model was trained for.",
            )
