"""Triggers drawn with characters."""

from __future__ import annotations

import torch
from rich.color import Color
from rich.style import Style
from rich.text import Text
from torch import Tensor
from torch.nn import functional

from backdoorscan.trigger import Trigger

WIDEST = 32
"""Columns of a drawing at most."""

_SHADES = ".:-=+*#%@"
_BACKGROUND = 0.5
"""The grey that the trigger is stamped on."""

_COVERED = 0.1
"""Mask above which a pixel belongs to the trigger."""


def draw(trigger: Trigger, color: bool) -> Text:
    """A trigger at most ``WIDEST`` columns wide, two rows of pixels to a line.

    Args:
        trigger: What to draw.
        color: With colours, the trigger stamped on grey; without, the mask in shades, cut to the part that matters.
    """
    mask = _reduced(trigger.mask.detach().cpu().float())
    _, height, width = mask.shape
    if not color:
        return _shaded(mask[0])
    pattern = functional.adaptive_avg_pool2d(trigger.pattern.detach().cpu().float(), (height, width))
    pattern = pattern[:3] if len(pattern) >= 3 else pattern[:1].expand(3, -1, -1)
    image = (_BACKGROUND + mask * (pattern - _BACKGROUND)).nan_to_num(_BACKGROUND).clamp(0, 1)
    return _half_blocks(image)


def place(trigger: Trigger) -> str:
    """Where the trigger lies, in words."""
    covered = (trigger.mask[0] > _COVERED).nonzero()
    if not len(covered):
        return "spread thinly over the image"
    (top, left), (bottom, right) = covered.amin(0).tolist(), covered.amax(0).tolist()
    return f"rows {top}–{bottom}, columns {left}–{right}"


def _reduced(mask: Tensor) -> Tensor:
    """The mask (1, H, W) within ``WIDEST`` in both directions; a single pixel stays visible."""
    height, width = mask.shape[1:]
    ratio = min(1.0, WIDEST / max(height, width))
    return functional.adaptive_max_pool2d(mask, (max(1, round(height * ratio)), max(1, round(width * ratio))))


def _half_blocks(image: Tensor) -> Text:
    """An image (3, H, W): the upper pixel is the character's colour, the lower one its background."""
    rows = (image * 255).round().int().permute(1, 2, 0).tolist()
    text = Text(no_wrap=True, end="")
    for start in range(0, len(rows), 2):
        if start:
            text.append("\n")
        below = rows[start + 1] if start + 1 < len(rows) else [None] * len(rows[start])
        for upper, lower in zip(rows[start], below, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower) if lower else None))
    return text


def _shaded(mask: Tensor) -> Text:
    """A mask (H, W) in shades, without the empty parts around it."""
    covered = (mask > _COVERED).nonzero()
    if not len(covered):
        return Text("")
    (top, left), (bottom, right) = covered.amin(0).tolist(), covered.amax(0).tolist()
    part = mask[top : bottom + 1, left : right + 1].nan_to_num().clamp(0, 1)
    if len(part) % 2:
        part = torch.cat([part, torch.zeros(1, part.shape[1])])
    levels = (part.reshape(-1, 2, part.shape[1]).amax(1) * (len(_SHADES) - 1)).round().int().tolist()
    return Text("\n".join("".join(_SHADES[level] for level in line) for line in levels), no_wrap=True)
