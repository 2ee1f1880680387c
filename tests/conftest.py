"""What several tests need: a planted network as a file, and registries with plugins made up on the spot."""

import fcntl
import pickle
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier
from backdoorscan.demo import DemoFiles, make_demo
from backdoorscan.formats import weights
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.images import LabelledImages
from backdoorscan.plugin import hookspecs
from backdoorscan.plugin.testing import planted, planted_network
from backdoorscan.registry import Registry

torch.set_num_threads(1)

TARGET = 2
CLASSES = 5
BLOCKS = 3

ARCHITECTURE = f"""
from backdoorscan.plugin.testing import planted_network

def net():
    return planted_network(None, classes={CLASSES}, blocks={BLOCKS})
"""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> DemoFiles:
    """A backdoored network, its clean twin, and images: trained once, whichever process asks first."""
    alone = not hasattr(request.config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    folder = base if alone else base.parent  # what the processes of pytest-xdist have in common
    facts = folder / "demo.pickle"
    with (folder / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not facts.exists():
            facts.write_bytes(pickle.dumps(make_demo(folder / "demo")))
    files: DemoFiles = pickle.loads(facts.read_bytes())
    return files


@dataclass(frozen=True)
class ModelFile:
    """A state dict with its architecture, and images for it."""

    path: Path
    read: ReadOptions
    images: LabelledImages
    poisoned: LabelledImages


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[[int | None], ModelFile]:
    """Writes ``planted(target)`` as a state dict; poisoned images carry the target label ``TARGET``."""

    def write(target: int | None) -> ModelFile:
        path, arch = tmp_path / "net.pt", tmp_path / "arch.py"
        torch.save(planted_network(target, classes=CLASSES, blocks=BLOCKS).state_dict(), path)
        arch.write_text(ARCHITECTURE)
        _, images, trigger = planted(TARGET, classes=CLASSES, blocks=BLOCKS, count=60)
        victims = images.take(np.flatnonzero(images.labels != TARGET))
        stamped = trigger.stamp(torch.from_numpy(victims.pixels) / 255).numpy()
        poisoned = LabelledImages(stamped, np.full_like(victims.labels, TARGET), "poisoned")
        return ModelFile(path, ReadOptions(arch=f"{arch}:net"), images, poisoned)

    return write


@pytest.fixture
def registry_of() -> Callable[..., Registry]:
    """A registry with the weights formats and the given classes: ``registry_of(detectors=[A], repairers=[B])``."""

    def make(**components: list[type[Any]]) -> Registry:
        registry = Registry()
        registry.manager.add_hookspecs(hookspecs)
        registry.add(lambda: weights, "weights", "core", "1")
        registry.add(lambda: module_of(**components), "made_up", "made-up", "2.0")
        assert not [plugin.error for plugin in registry.plugins if plugin.error]
        return registry

    def module_of(**components: list[type[Any]]) -> ModuleType:
        module = ModuleType("made_up")
        for kind, classes in components.items():
            name = f"backdoorscan_{kind}"
            hook = eval(f"lambda: classes_{kind}", {f"classes_{kind}": classes})
            setattr(module, name, hookimpl(hook, specname=name))
        return module

    return make


@pytest.fixture
def triple() -> Callable[..., tuple[Classifier, LabelledImages, Any]]:
    """A small planted classifier: ``triple(target)``."""
    return lambda target, **options: planted(target, **{"classes": CLASSES, "blocks": BLOCKS, "count": 60} | options)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """``with full_disk(100): ...``: no file that this process writes grows beyond so many bytes, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many hostile files of each family were refused, and how many loaded as harmless.

    Here, since with several processes the one that prints loads this file alone.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "hostile":
                counts.update({(family, outcome): number for family, outcome, number in value})
    if not counts:
        return
    terminalreporter.section("hostile files")
    for family in sorted({family for family, _ in counts}):
        refused, loaded = counts[family, "refused"], counts[family, "loaded"]
        terminalreporter.write_line(f"{family:32} {refused:6} refused {loaded:6} loaded as harmless")
    total = [sum(number for (_, kind), number in counts.items() if kind == word) for word in ("refused", "loaded")]
    terminalreporter.write_line(f"{'all':32} {total[0]:6} refused {total[1]:6} loaded as harmless")
