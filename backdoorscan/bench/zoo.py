"""The zoo: networks that are trained once and kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from backdoorscan import cache
from backdoorscan.bench.architectures import reference
from backdoorscan.bench.pool import run_all
from backdoorscan.bench.spec import ModelSpec
from backdoorscan.bench.training import fit, right
from backdoorscan.costing import versions
from backdoorscan.demo.training import one_thread
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.images import LabelledImages

TAKEN = 0.5
"""Attack success from which an attack counts as having taken."""


@dataclass(frozen=True)
class ZooEntry:
    """A trained network.

    Attributes:
        spec: What it is.
        path: Its weights, a safetensors file.
        sha256: Of that file.
        accuracy: On the test images, in [0, 1].
        attack_success: The share of stamped test images that get the label the attacker wants; ``None`` if clean.
        seconds: Processor time of the training.
        fresh: Whether this run trained it.
    """

    spec: ModelSpec
    path: Path
    sha256: str
    accuracy: float
    attack_success: float | None
    seconds: float
    fresh: bool = False

    @property
    def took(self) -> bool:
        """Whether the network is what it should be: clean, or backdoored by an attack that works."""
        return self.attack_success is None or self.attack_success >= TAKEN

    @property
    def clean(self) -> LabelledImages:
        """The defender's images."""
        return self.spec.data.clean

    @property
    def test(self) -> LabelledImages:
        """Images to measure on."""
        return self.spec.data.test

    @property
    def read(self) -> ReadOptions:
        """How to read the file."""
        data = self.spec.data
        return ReadOptions(reference(self.spec.architecture, data.shape, data.num_classes), input_range=(0.0, 1.0))

    def load(self) -> LoadedModel:
        """The network, by the way any model file takes."""
        return load_model(self.path, self.clean, self.read)


def train_zoo(
    specs: Sequence[ModelSpec],
    folder: Path | None = None,
    *,
    jobs: int = 1,
    observer: Callable[[str, float], None] = lambda _stage, _fraction: None,
) -> Iterator[ZooEntry]:
    """Train the networks that are not there yet, and yield all in the order of ``specs``.

    An interrupted run goes on where it ended: each network is kept as soon as it is trained.

    Args:
        specs: The networks.
        folder: The cache; ``cache.default_folder()`` if ``None``.
        jobs: Processes that train at a time, each on one thread.
        observer: Told which part is done.

    Raises:
        ImagesError: An attack finds nothing to poison.
        OutputError: The cache cannot be written to.
    """
    place = (folder or cache.default_folder()) / "zoo"
    observer("training", 0.0)
    kept = [_find(spec, place) for spec in specs]
    missing = [spec for spec, entry in zip(specs, kept, strict=True) if entry is None]
    fresh = run_all(_make, [(spec, place) for spec in missing], jobs)
    for position, entry in enumerate(kept):
        yield entry or next(fresh)
        observer("training", (position + 1) / len(specs))


def _paths(spec: ModelSpec, place: Path) -> tuple[Path, Path]:
    return place / spec.key / "model.safetensors", place / spec.key / "model.json"


def _find(spec: ModelSpec, place: Path) -> ZooEntry | None:
    """The network if it is kept whole."""
    weights, facts = _paths(spec, place)
    found = cache.read_json(facts)
    try:
        if found is None or hashlib.sha256(weights.read_bytes()).hexdigest() != found["sha256"]:
            return None
        return _entry(spec, weights, found)
    except (OSError, KeyError):
        return None


def _entry(spec: ModelSpec, weights: Path, facts: dict[str, Any], *, fresh: bool = False) -> ZooEntry:
    return ZooEntry(
        spec,
        weights,
        sha256=facts["sha256"],
        accuracy=facts["accuracy"],
        attack_success=facts["attack_success"],
        seconds=facts["cpu_seconds"],
        fresh=fresh,
    )


def _make(spec: ModelSpec, place: Path) -> ZooEntry:
    """Train, measure and keep one network."""
    started = time.process_time()
    with one_thread():
        network = fit(spec.architecture, spec.training_images(), spec.data.num_classes, spec.recipe, spec.seed)
        seconds = time.process_time() - started
        attacked = spec.attacked()
        success = None if attacked is None else right(network, attacked)
        content = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
        facts = {
            "accuracy": right(network, spec.data.test),
            "attack_success": success,
            "cpu_seconds": round(seconds, 2),
            "sha256": hashlib.sha256(content).hexdigest(),
            "arch": reference(spec.architecture, spec.data.shape, spec.data.num_classes),
            "spec": spec.to_json(),
            "targets": list(spec.targets),
            "versions": versions(),
        }
    weights, described = _paths(spec, place)
    cache.write(weights, content)
    cache.write_json(described, facts)  # last: it says that the network is whole
    return _entry(spec, weights, facts, fresh=True)
