"""Small networks on digits, clean and attacked, trained once in a session."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest

from backdoorscan.bench.data import load_datasets
from backdoorscan.bench.spec import plan_zoo
from backdoorscan.bench.zoo import train_zoo
from backdoorscan.classifier import Classifier
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim
from backdoorscan.registry import installed


@dataclass(frozen=True)
class Trained:
    """A network, the defender's images for it, and what was done to it."""

    classifier: Classifier
    images: LabelledImages
    aim: Aim


@pytest.fixture(scope="session")
def _networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    folder, digits = tmp_path_factory.mktemp("zoo"), load_datasets(["digits"])[0]

    @cache
    def train(attack: str) -> Trained:
        attacks = [] if attack == "clean" else [installed().find("attack", attack).component()]
        specs = plan_zoo([digits], ["conv-dense"], attacks, clean=int(attack == "clean"))
        (entry,) = train_zoo(specs, folder)
        assert entry.took
        return Trained(entry.load().classifier, entry.clean, entry.spec.aim)

    return train


@pytest.fixture
def trained(_networks: Callable[[str], Trained]) -> Callable[[str], Trained]:
    """``trained("badnets")``, or any other attack, or ``trained("clean")``: a copy of its own for each test."""

    def copy(attack: str) -> Trained:
        network = _networks(attack)
        return replace(network, classifier=network.classifier.clone())

    return copy
