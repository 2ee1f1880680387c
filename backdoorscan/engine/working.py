"""The images that a scan works on: the user's, and such as are made from the model where those are few or missing."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.images import LabelledImages
from backdoorscan.ops.synthesis import make_images
from backdoorscan.plugin.method import Context

FEW = 20
"""Clean images below which such as are made from the model are put beside them."""


@dataclass(frozen=True)
class Working:
    """What the detectors of a scan are given.

    Attributes:
        given: The user's images, or ``None``.
        images: The user's and after them the made ones, or ``None`` where no detector needs any.
        gradient_samples: What making them cost.
    """

    given: LabelledImages | None
    images: LabelledImages | None
    gradient_samples: int = 0

    @property
    def made(self) -> int:
        """How many were made from the model."""
        return (0 if self.images is None else len(self.images)) - (0 if self.given is None else len(self.given))

    @property
    def notes(self) -> list[str]:
        """What the reader of the verdict has to know of them."""
        if not self.made:
            return []
        if self.given is None:
            return ["no clean images: the scan worked on images made from the model; its verdict is less certain"]
        return [f"few clean images: the scan worked on {self.made} images made from the model beside them"]

    def described(self, seed: int) -> dict[str, Any] | None:
        """The images' part of the report, with a few of the user's, if any, to show triggers on."""
        shown = self.given or self.images
        if shown is None or self.images is None:
            return None
        return {
            "path": None if self.given is None else self.given.source,
            "sha256": shown.sha256,
            "count": len(self.images),
            "synthetic": self.made > 0,
            "made": self.made,
            "sample": _sample(shown, seed),
        }


def working_images(given: LabelledImages | None, classifier: Classifier, context: Context) -> Working:
    """The user's images if they are not few; otherwise such as are made from the model beside them or in their place.

    Raises:
        MethodError: The model cannot be made to show its classes, or there is no time.
    """
    if given is not None and len(given) >= FEW:
        return Working(given, given)

    def watched(part: float) -> None:
        if context.out_of_time:
            raise MethodError("Making images from the model ran out of time.", hint="Raise --timeout or pass --valid.")
        context.progress(part)

    made, samples = make_images(classifier, context.generator("made images"), watched)
    if given is None:
        if made is None or len(np.unique(made.labels)) < 2:
            raise MethodError(
                "No images can be made from this model.",
                why="Gradients do not lead to images of two of its classes.",
                hint="Pass clean images with --valid.",
            )
        return Working(None, made, samples)
    if made is None:
        return Working(given, given, samples)
    pixels = np.concatenate([to_tensor(given.pixels).numpy(), made.pixels])
    labels = np.concatenate([given.labels, made.labels])
    return Working(given, LabelledImages(pixels, labels, given.source), samples)


def _sample(images: LabelledImages, seed: int) -> list[dict[str, Any]]:
    """A few of the images, packed, so that reports can show triggers on them."""
    few = images.sample(4, seed)
    pixels = few.pixels if few.pixels.dtype == np.uint8 else np.round(255 * few.pixels).astype(np.uint8)
    return [
        {"shape": list(image.shape), "uint8": base64.b64encode(zlib.compress(image.tobytes(), 9)).decode()}
        for image in pixels
    ]
