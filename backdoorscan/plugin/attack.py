"""The contract of an attack: how a backdoor is put into training data. The bench trains on it; nothing else does."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ImagesError
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Method, option

Pixels: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int64]
Index: TypeAlias = npt.NDArray[np.intp]
Mapping: TypeAlias = Literal["all-to-one", "all-to-all", "source-specific", "multi-target"]


@dataclass(frozen=True)
class Aim:
    """What one attacker has decided. The same aim gives the same trigger wherever it is asked for.

    Attributes:
        shape: (C, H, W) of the images.
        num_classes: K.
        target: The label that the trigger leads to; where the mapping knows several, the first.
        seed: Every random choice of the attacker follows from it.
    """

    shape: tuple[int, int, int]
    num_classes: int
    target: int
    seed: int

    def random(self, *purpose: object) -> np.random.Generator:
        """Random numbers for one purpose, the same whatever else is drawn."""
        digest = hashlib.sha256(repr((self.seed, *purpose)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))

    def draw(self, purpose: str, candidates: Index, count: float) -> Index:
        """``count`` of the candidates, rounded, at least one and at most all; in increasing order."""
        size = min(len(candidates), max(1, round(count)))
        return np.sort(self.random(purpose).choice(candidates, size, replace=False))


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """Puts a backdoor into training data.

    An attack says how an image is stamped (``stamp``) and which label it then gets (``wanted``); which images are
    taken, and what becomes of the rest, is the same for most of them. Nothing changes the images that it is given.

    Attributes:
        family: What kind of trigger it is, e.g. ``"patch"``, ``"pattern"``, ``"warp"``.
        mapping: Which classes lead where.
    """

    family: ClassVar[str]
    mapping: ClassVar[Mapping] = "all-to-one"

    rate: float = option(0.1, help="Share of the training images that are poisoned.", minimum=0, maximum=1)

    @property
    def variants(self) -> int:
        """How many triggers there are; any of them is enough."""
        return 1

    @abstractmethod
    def stamp(self, pixels: Pixels, aim: Aim, variant: int = 0) -> Pixels:
        """Images with the trigger on them.

        Args:
            pixels: Shape (N, C, H, W) with ``aim.shape``; left as they are.
            aim: What the trigger follows from.
            variant: Which trigger, from 0.
        """

    def wanted(self, labels: Labels, aim: Aim, variant: int = 0) -> Labels:
        """The label that the attacker wants stamped images of the classes ``labels`` to get; the same shape (N,)."""
        return np.full_like(labels, aim.target)

    def targets(self, aim: Aim) -> tuple[int, ...]:
        """The labels that some trigger leads some other class to, in increasing order."""
        labels = np.arange(aim.num_classes)
        wanted = [self.wanted(labels, aim, variant) for variant in range(self.variants)]
        return tuple(sorted({int(label) for row in wanted for label in row[row != labels]}))

    def victims(self, labels: Labels, aim: Aim) -> Index:
        """Which images every trigger would have to move to another class, in increasing order."""
        moved = [self.wanted(labels, aim, variant) != labels for variant in range(self.variants)]
        return np.flatnonzero(np.all(moved, axis=0))

    def chosen(self, labels: Labels, aim: Aim) -> Index:
        """Which training images are poisoned, in increasing order; at least one, where there is a victim."""
        return aim.draw("poisoned", self.victims(labels, aim), self.rate * len(labels))

    def poison(self, images: LabelledImages, aim: Aim) -> LabelledImages:
        """The attacker's training set: of the same size and order, some images stamped and given the wanted label.

        Raises:
            ImagesError: The images are of another shape, or there is no victim among them.
        """
        pixels, labels = checked(images, aim), images.labels.copy()
        self._require_victims(images, aim)
        self._put(pixels, labels, self.chosen(images.labels, aim), aim)
        return replace(images, pixels=pixels, labels=labels, source=f"{images.source}, {self.id}", sha256="")

    def attacked(self, images: LabelledImages, aim: Aim) -> LabelledImages:
        """All victims among the images, stamped, with the wanted labels: accuracy on them is the attack success rate.

        Images for which nothing would have to succeed, e.g. those of the target class, are left out.

        Raises:
            ImagesError: The images are of another shape, or there is no victim among them.
        """
        checked(images, aim)
        victims = images.take(self._require_victims(images, aim))
        pixels, labels = checked(victims, aim), victims.labels.copy()
        self._put(pixels, labels, np.arange(len(labels)), aim)
        return replace(victims, pixels=pixels, labels=labels, source=f"{images.source}, stamped", sha256="")

    def _put(self, pixels: Pixels, labels: Labels, chosen: Index, aim: Aim) -> None:
        """Stamp and label the chosen images in place, the triggers in turn."""
        for variant in range(self.variants):
            index = chosen[variant :: self.variants]
            pixels[index] = self.stamp(pixels[index], aim, variant)
            labels[index] = self.wanted(labels[index], aim, variant)

    def _require_victims(self, images: LabelledImages, aim: Aim) -> Index:
        victims = self.victims(images.labels, aim)
        if not len(victims):
            raise ImagesError(
                f"{images.source}: no image that {self.id} could move to another class.",
                why=f"All of them have a label that the attack leads to ({aim.target}) or leaves alone.",
                hint="Give images of several classes.",
            )
        return victims


def checked(images: LabelledImages, aim: Aim) -> Pixels:
    """A copy of the images' pixels as uint8, shape (N, C, H, W).

    Raises:
        ImagesError: The images are not of ``aim.shape``.
    """
    if images.shape != aim.shape:
        raise ImagesError(f"{images.source}: images of {images.shape}; the trigger was made for {aim.shape}.")
    if images.pixels.dtype == np.uint8:
        return images.pixels.astype(np.uint8)
    return np.rint(images.pixels * 255).astype(np.uint8)


def as_pixels(values: npt.NDArray[np.floating]) -> Pixels:
    """Values on the scale 0..255, of any shape, rounded and cut off."""
    pixels: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return pixels
