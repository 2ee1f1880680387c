"""Stamping triggers on some images of a batch, to unlearn them or to learn to reject them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
