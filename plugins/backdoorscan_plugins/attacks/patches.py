"""Patches that do not simply lead every class to one label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim, Attack, Index, Labels, Pixels
from backdoorscan.plugin.method import option
from backdoorscan_plugins.attacks.patch import SIZE_HELP, draw_patch, side_in_pixels


@dataclass(frozen=True, kw_only=True)
class _Patches(Attack):
    """What they share: each variant is a patch in a corner of its own."""

    family = "patch"

    size: float = option(0.15, help=SIZE_HELP, minimum=0, maximum=0.5)

    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the variant's patch."""
        return draw_patch(pixels, aim, side_in_pixels(self.size, aim), variant)


@dataclass(frozen=True, kw_only=True)
class AllToAll(_Patches):
    """A patch leads every class to the next: i to i + 1, and the last to the first. There is no one target."""

    id = "all-to-all"
    paper = "Gu, Dolan-Gavitt, Garg: BadNets: Identifying Vulnerabilities in the ML Model Supply Chain. 2017"
    mapping = "all-to-all"

    rate: float = option(0.3, help="Share of the training images that are poisoned.", minimum=0, maximum=1)

    def wanted(self, labels: Labels, aim: Aim, variant: int = 0) -> Labels:
        """The next class."""
        return (labels + 1) % aim.num_classes


@dataclass(frozen=True, kw_only=True)
class SourceSpecific(_Patches):
    """A patch leads one class to the target and no other anywhere.

    The source class follows from the seed. Cover images make the patch mean nothing elsewhere: images of other
    classes that carry it and keep their label.
    """

    id = "source-specific"
    paper = (
        "Tang, Wang, Tang, Zhang: Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor "
        "Contamination Detection. USENIX Security 2021"
    )
    mapping = "source-specific"

    rate: float = option(0.5, help="Share of the source class's images that are poisoned.", minimum=0, maximum=1)
    cover_rate: float = option(0.15, help="Share of the other images that are covers.", minimum=0, maximum=1)

    def source(self, aim: Aim) -> int:
        """The class that the trigger works from."""
        return int(aim.target + aim.random("source").integers(1, aim.num_classes)) % aim.num_classes

    def wanted(self, labels: Labels, aim: Aim, variant: int = 0) -> Labels:
        """The target for the source class; for others their own label."""
        return np.where(labels == self.source(aim), aim.target, labels)

    def chosen(self, labels: Labels, aim: Aim) -> Index:
        """Images of the source class."""
        source = self.victims(labels, aim)
        return aim.draw("poisoned", source, self.rate * len(source))

    def poison(self, images: LabelledImages, aim: Aim) -> LabelledImages:
        """Poisoned images of the source class, and covers of the others."""
        poisoned = super().poison(images, aim)
        others = np.flatnonzero(images.labels != self.source(aim))
        if not len(others):
            return poisoned
        covers = aim.draw("covers", others, self.cover_rate * len(others))
        pixels = poisoned.pixels.astype(np.uint8)
        pixels[covers] = self.stamp(pixels[covers], aim)
        return LabelledImages(pixels, poisoned.labels, poisoned.source)


@dataclass(frozen=True, kw_only=True)
class MultiTrigger(_Patches):
    """Several patches in different corners, each of which leads every class to the one target."""

    id = "multi-trigger"
    paper = "Li, He, Huang, Sun, Ma: Multi-Trigger Backdoor Attacks: More Triggers, More Threats. 2024"

    rate: float = option(0.15, help="Share of the training images that are poisoned.", minimum=0, maximum=1)
    triggers: int = option(3, help="Number of patches.", minimum=2, maximum=4)

    @property
    def variants(self) -> int:
        """One per patch."""
        return self.triggers


@dataclass(frozen=True, kw_only=True)
class MultiTarget(MultiTrigger):
    """Several patches in different corners, each of which leads every class to a target of its own.

    The first leads to the target, the next to the class after it, and so on.
    """

    id = "multi-target"
    paper = (
        "Xue, He, Wang, Liu: One-to-N & N-to-One: Two Advanced Backdoor Attacks against Deep Learning Models. IEEE "
        "TDSC 2020"
    )
    mapping = "multi-target"

    def wanted(self, labels: Labels, aim: Aim, variant: int = 0) -> Labels:
        """The variant's target."""
        return np.full_like(labels, (aim.target + variant) % aim.num_classes)
