"""A zoo of networks that train in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backdoorscan_plugins.attacks.patch import BadNets

from backdoorscan.bench import zoo
from backdoorscan.bench.data import Dataset, load_datasets
from backdoorscan.bench.spec import ModelSpec, plan_zoo
from backdoorscan.bench.training import Recipe

BRIEF = Recipe(samples=2000, epochs=1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The built-in images."""
    return load_datasets(["digits"])[0]


@pytest.fixture
def specs(digits: Dataset) -> list[ModelSpec]:
    """Two clean networks and a backdoored one."""
    return plan_zoo([digits], ["conv-dense"], [BadNets()], clean=2, recipe=BRIEF)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all networks that are trained in this process."""
    seeds: list[int] = []
    fit: Callable[..., Any] = zoo.fit

    def counted(*arguments: Any) -> Any:
        seeds.append(arguments[-1])
        return fit(*arguments)

    monkeypatch.setattr(zoo, "fit", counted)
    return seeds


@pytest.fixture
def image_file(tmp_path: Path) -> Callable[..., str]:
    """Writes random images of two classes: ``image_file(count)``."""

    def write(count: int, shape: tuple[int, ...] = (12, 12, 3)) -> str:
        pixels = np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)
        np.savez(tmp_path / "made.npz", x=pixels, y=np.arange(count) % 2)
        return str(tmp_path / "made.npz")

    return write
