"""Stamping triggers: on some images of a batch, to learn from, and as faint as they may be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from backdoorscan.classifier import Classifier, logits
from backdoorscan.trigger import Trigger


def stamp_some(
    images: Tensor, triggers: Sequence[Trigger], count: int, generator: torch.Generator, *, opacity: float = 1.0
) -> Tensor:
    """The images with a random trigger on each of the first ``count``.

    Args:
        images: Shape (N, C, H, W) in [0, 1], in random order.
        triggers: At least one.
        count: How many images to stamp.
        generator: Random numbers.
        opacity: Masks are multiplied by up to this, and cut at 1. A reversed trigger is fainter than the true one, as
            its search ends where it just works; 2 covers what lies between.
    """
    stamped = images.clone()
    which = torch.randint(len(triggers), (count,), generator=generator).tolist()
    factors = 1 + (opacity - 1) * torch.rand(count, generator=generator)
    for position, (choice, factor) in enumerate(zip(which, factors, strict=True)):
        trigger = triggers[choice]
        mask = (trigger.mask * factor).clamp(max=1)
        stamped[position] = Trigger(mask, trigger.pattern, trigger.target).stamp(images[position])
    return stamped


_OPACITIES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def needed_opacity(classifier: Classifier, trigger: Trigger, images: Tensor, share: float) -> float | None:
    """How opaque a trigger has to be to send a share of the images to its target.

    A search ends at a success rate that a few images estimate, where more mask gains little; in the middle of the
    curve the size of what works is told far more precisely.

    Args:
        classifier: The network.
        trigger: Its mask is multiplied by the opacity.
        images: Shape (N, C, H, W) in [0, 1].
        share: Of the images, 0 to 1.

    Returns:
        From 0 to 1, between the opacities tried by interpolation; ``None`` if the whole trigger does not do it.
    """
    reached, before = 0.0, 0.0
    for lower, opacity in pairwise(_OPACITIES):
        fainter = Trigger(trigger.mask * opacity, trigger.pattern, trigger.target)
        reached = float((logits(classifier, fainter.stamp(images)).argmax(1) == trigger.target).double().mean())
        if reached >= share:
            return lower + (opacity - lower) * (share - before) / (reached - before) if reached > before else lower
        before = reached
    return None
