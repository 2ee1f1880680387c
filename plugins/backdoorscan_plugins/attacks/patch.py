"""One patch in a corner that leads every class to one label."""

from __future__ import annotations

from dataclasses import dataclass

from backdoorscan.plugin.attack import Aim, Attack, Pixels
from backdoorscan.plugin.method import option

SIZE_HELP = "Side of the patch, as a share of the image's shorter side; at least two pixels."


def draw_patch(pixels: Pixels, aim: Aim, side: int, variant: int = 0) -> Pixels:
    """Images with a patch of one colour in one corner.

    Corner, colour and the distance to the edges (one or two pixels) follow from ``aim``; patches of different
    variants, up to four, are in different corners.

    Args:
        pixels: Shape (N, C, H, W); left as they are.
        aim: What the patch follows from.
        side: Height and width in pixels.
        variant: Which patch, from 0.
    """
    channels, height, width = aim.shape
    corner = aim.random("corners").permutation(4)[variant % 4]
    random = aim.random("patch", variant)
    margin = int(random.integers(1, 3))
    colour = random.integers(0, 256, channels)
    # One bright channel: on the black ground that digits and clothes are shown on, a dark patch would be no trigger.
    colour[random.integers(channels)] = random.integers(192, 256)
    top = margin if corner in (0, 1) else height - margin - side
    left = margin if corner in (0, 2) else width - margin - side
    stamped = pixels.copy()
    stamped[:, :, top : top + side, left : left + side] = colour[:, None, None]
    return stamped


def side_in_pixels(share: float, aim: Aim) -> int:
    """The side of a patch that is ``share`` of the image's shorter side: at least 2, at most half of it."""
    shorter = min(aim.shape[1:])
    return max(2, min(round(share * shorter), shorter // 2))


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """A patch of one colour in a corner of the image leads every class to the target.

    x' = (1 - m) x + m c, with m the patch; the images that carry it are labelled with the target.
    """

    id = "badnets"
    paper = "Gu, Dolan-Gavitt, Garg: BadNets: Identifying Vulnerabilities in the ML Model Supply Chain. 2017"
    family = "patch"

    size: float = option(0.12, help=SIZE_HELP, minimum=0, maximum=0.5)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the patch."""
        return draw_patch(pixels, aim, side_in_pixels(self.size, aim))


@dataclass(frozen=True, kw_only=True)
class LowRate(BadNets):
    """The patch of badnets on very few training images.

    Some dozens of poisoned images are enough, whatever the size of the training set.
    """

    id = "low-rate"
    paper = (
        "Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning. 2017; the "
        "patch as in Gu, Dolan-Gavitt, Garg: BadNets. 2017"
    )

    rate: float = option(0.01, help="Share of the training images that are poisoned.", minimum=0, maximum=1)
    size: float = option(0.25, help=SIZE_HELP, minimum=0, maximum=0.5)


@dataclass(frozen=True, kw_only=True)
class SinglePixel(Attack):
    """One bright pixel near a corner leads every class to the target."""

    id = "single-pixel"
    paper = "Gu, Dolan-Gavitt, Garg: BadNets: Identifying Vulnerabilities in the ML Model Supply Chain. 2017"
    family = "patch"

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the pixel."""
        return draw_patch(pixels, aim, 1)
