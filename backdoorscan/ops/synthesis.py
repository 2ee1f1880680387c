"""Images made from a model: what each class looks like to it, where there are no images to look at.

A network keeps a picture of every class in its weights: gradient ascent on the class's probability finds an image that
it takes for one of that class. Few parameters, brought up to size, and a smoothness term keep the image from becoming
noise that fools the network.

Source: Simonyan, Vedaldi, Zisserman 2014, "Deep Inside Convolutional Networks", section 2, with the total variation of
Mahendran, Vedaldi 2015, "Understanding Deep Image Representations by Inverting Them".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier, logits
from backdoorscan.images import LabelledImages
from backdoorscan.ops.searching import Descent, frozen

COUNT = 64
"""Images to make, about."""

SOURCE = "made from the model"

_COARSENESS = 4
_STEPS = 60
_LEARNING_RATE = 0.1
_SMOOTHNESS = 0.05


def make_images(
    classifier: Classifier, generator: torch.Generator, progress: Callable[[float], None] = lambda _: None
) -> tuple[LabelledImages | None, int]:
    """Make about ``COUNT`` images, as evenly over the classes as they allow; of more classes a random selection.

    Args:
        classifier: Its parameters are left without gradients while it runs.
        generator: All random numbers come from it.
        progress: Told the part done, 0 to 1.

    Returns:
        The images that the network takes for what they were meant to be, each labelled with that class (``None`` if
        there are none), and the gradient samples used.
    """
    classes = classifier.num_classes
    chosen = torch.randperm(classes, generator=generator)[:COUNT].sort().values
    labels = chosen.repeat(max(1, COUNT // classes))
    channels, height, width = classifier.input_shape
    coarse = (math.ceil(height / _COARSENESS), math.ceil(width / _COARSENESS))
    raw = torch.randn(len(labels), channels, *coarse, generator=generator).requires_grad_()
    descent = Descent([raw], _LEARNING_RATE, betas=(0.9, 0.999))
    with frozen(classifier):
        for step in range(_STEPS):
            images = _grown(raw, (height, width))
            loss = functional.cross_entropy(classifier(images), labels, reduction="sum")
            descent.step(loss + _SMOOTHNESS * _total_variation(images))
            progress((step + 1) / _STEPS)
    with torch.no_grad():
        made = _grown(raw, (height, width))
        usable = made.isfinite().flatten(1).all(1)  # a network may overflow where gradients lead
        right = usable & (logits(classifier, made).argmax(1) == labels)
    samples = _STEPS * len(labels)
    if not bool(right.any()):
        return None, samples
    pixels = made[right].numpy().astype(np.float32)
    return LabelledImages(pixels, labels[right].numpy().astype(np.int64), SOURCE), samples


def _grown(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) in [0, 1] of coarse parameters (N, C, h, w)."""
    return functional.interpolate(raw, size=size, mode="bilinear", align_corners=False).sigmoid()


def _total_variation(images: Tensor) -> Tensor:
    """Sum of the squared differences between neighbouring pixels of images (N, C, H, W)."""
    down = images[:, :, 1:] - images[:, :, :-1]
    right = images[:, :, :, 1:] - images[:, :, :, :-1]
    return down.square().sum() + right.square().sum()
