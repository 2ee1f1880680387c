"""What a network of the zoo is: everything that its weights follow from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from backdoorscan.bench.architectures import ARCHITECTURES
from backdoorscan.bench.data import Dataset
from backdoorscan.bench.training import Recipe
from backdoorscan.cache import digest
from backdoorscan.errors import UnknownNameError, UsageError
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim, Attack

_FORM = 1  # rises when the same specification would give another network


@dataclass(frozen=True)
class ModelSpec:
    """One network.

    Attributes:
        data: What it is trained and measured on.
        architecture: A key of ``ARCHITECTURES``.
        attack: What is done to its training images, or ``None`` for a clean network.
        target: The label that the trigger leads to; meaningless for a clean network.
        seed: Of the weights, the order of the images, and the trigger.
        recipe: How it is trained.
    """

    data: Dataset = field(repr=False)
    architecture: str
    attack: Attack | None
    target: int
    seed: int
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.data.name} {self.architecture} {self.attack.id if self.attack else 'clean'}"

    @property
    def aim(self) -> Aim:
        """What the trigger follows from."""
        return Aim(self.data.shape, self.data.num_classes, self.target, self.seed)

    @property
    def targets(self) -> tuple[int, ...]:
        """The labels that triggers lead to; none for a clean network."""
        return self.attack.targets(self.aim) if self.attack else ()

    def training_images(self) -> LabelledImages:
        """What the network is trained on."""
        return self.attack.poison(self.data.train, self.aim) if self.attack else self.data.train

    def attacked(self) -> LabelledImages | None:
        """Stamped test images with the labels that the attacker wants, or ``None`` for a clean network."""
        return self.attack.attacked(self.data.test, self.aim) if self.attack else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "form": _FORM,
            "data": {"name": self.data.name, "train": self.data.train.sha256, "test": self.data.test.sha256},
            "shape": list(self.data.shape),
            "num_classes": self.data.num_classes,
            "architecture": self.architecture,
            "attack": self.attack.id if self.attack else None,
            "settings": self.attack.settings() if self.attack else {},
            "target": self.target if self.attack else None,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
        }

    @cached_property
    def key(self) -> str:
        """The network's name in the cache."""
        facts = self.to_json()
        images: dict[str, str] = {part: facts["data"][part] for part in ("train", "test")}
        if self.attack:
            # What the attack makes of the test images tells one trigger from another where settings do not: the
            # author of an attack may have changed it.
            images["poisoned"] = self.attack.poison(self.data.test, self.aim).sha256
            images["stamped"] = self.attack.attacked(self.data.test, self.aim).sha256
        return digest({**facts, "data": images})


def plan_zoo(
    datasets: Sequence[Dataset],
    architectures: Sequence[str],
    attacks: Sequence[Attack],
    *,
    clean: int = 5,
    backdoored: int = 1,
    seed: int = 0,
    recipe: Recipe | None = None,
) -> list[ModelSpec]:
    """The networks of a zoo: every architecture on all data, clean and with every attack.

    Each network has weights, a target and a trigger of its own, which do not depend on what else is in the zoo.

    Args:
        datasets: The images.
        architectures: Keys of ``ARCHITECTURES``; all if empty.
        attacks: Configured attacks.
        clean: Clean networks of each architecture on each data set.
        backdoored: Backdoored networks of each attack on each architecture and data set.
        seed: Of the whole zoo.
        recipe: How the networks are trained.

    Raises:
        UnknownNameError: There is no such architecture.
        UsageError: There would be no network at all.
    """
    for name in architectures:
        if name not in ARCHITECTURES:
            raise UnknownNameError("architecture", name, ARCHITECTURES)
    specs = []
    for data in datasets:
        for architecture in dict.fromkeys(architectures or ARCHITECTURES):
            kinds: list[tuple[Attack | None, int]] = [(None, clean), *((attack, backdoored) for attack in attacks)]
            for attack, count in kinds:
                for number in range(count):
                    own = _seed(seed, architecture, attack.id if attack else "", data.train.sha256, number)
                    target = int(np.random.default_rng(own).integers(data.num_classes))
                    specs.append(ModelSpec(data, architecture, attack, target, own, recipe or Recipe()))
    if not specs:
        raise UsageError("There would be no network in this zoo.", hint="Ask for clean networks, or for an attack.")
    return specs


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
