"""Where a hostile file is met: a folder with a trap for code, a secret, and an eye on what is opened and used."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import logits
from backdoorscan.errors import BackdoorscanError
from backdoorscan.formats.loading import ReadOptions, find_loader, load_model
from backdoorscan.formats.weights.loader import WeightsLoader
from backdoorscan.registry import installed

SECRET = np.full(256, 31337.0, np.float32)
"""What lies in the file beside the model: weights that hold any of it have read it."""

SHAPE = (1, 4, 4)
ARCHITECTURE = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
"""
_SECONDS = 600
_MEMORY = 2**30
_HUGE = 1e15
_EXECUTING = {"os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "ctypes.dlopen"}


class Hung(BaseException):
    """Reading did not end."""


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Attributes:
        family: What it tries.
        name: Which way.
        error: What it must be refused with; ``None`` where it must load as if what is hostile in it were not there.
        write: Writes it.
    """

    family: str
    name: str
    error: type[BackdoorscanError] | None
    write: Callable[[Yard], bytes | None]

    def __str__(self) -> str:
        return f"{self.family}-{self.name}".encode("unicode_escape").decode()


@dataclass
class Yard:
    """A folder for one hostile file.

    Attributes:
        folder: Everything is here.
        good: The good file of each format.
    """

    folder: Path
    good: dict[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        self.secret.write_bytes(SECRET.tobytes())
        self.architecture.write_text(ARCHITECTURE)

    @property
    def model(self) -> Path:
        """The hostile file."""
        return self.folder / "model.bin"

    @property
    def canary(self) -> Path:
        """What code from the file would make."""
        return self.folder / "canary"

    @property
    def secret(self) -> Path:
        """A file that is none of the model's business."""
        return self.folder / "secret"

    @property
    def architecture(self) -> Path:
        """The user's own code, for files of weights."""
        return self.folder / "arch.py"

    @property
    def command(self) -> str:
        """A shell command that makes the canary."""
        return f"touch {self.canary}"

    def put(self, case: Case) -> None:
        """Write a hostile file."""
        data = case.write(self)
        if data is not None:
            self.model.write_bytes(data)

    def options(self) -> ReadOptions:
        """What a user would say about the file: an architecture where it is one of weights."""
        try:
            loader = find_loader(Artifact.read(self.model), installed())
        except BackdoorscanError:
            return ReadOptions()
        weights = isinstance(loader, WeightsLoader)
        return ReadOptions(arch=f"{self.architecture}:net", input_shape=SHAPE) if weights else ReadOptions()

    def meet(self, options: ReadOptions | None = None) -> BackdoorscanError | None:
        """Load the model as a scan does, and check that nothing but loading or refusing it has happened.

        Returns:
            What it was refused with.
        """
        before = sorted(self.folder.rglob("*"))
        options = options or self.options()
        error: BackdoorscanError | None = None
        with _watched() as seen, _alarm(), _bounded():
            try:
                classifier = load_model(self.model, None, options).classifier
                scores = logits(classifier, torch.rand(2, *classifier.input_shape))
            except BackdoorscanError as refusal:
                error = refusal
        assert sorted(self.folder.rglob("*")) == before, "a file was made"
        opened = {place for event, place in seen if event == "open" and place.startswith(str(self.folder))}
        allowed = {str(self.model), str(self.architecture)}
        assert {place for place in opened if not place.startswith(str(self.model))} <= allowed
        assert [event for event, _ in seen if event in _EXECUTING] == []
        if error is None:
            weights = [tensor for tensor in classifier.state_dict().values() if tensor.is_floating_point()]
            # One flipped bit makes a finite weight so large that some images' scores are infinite.
            assert bool(torch.isfinite(scores).all()) or max(float(tensor.abs().max()) for tensor in weights) > _HUGE
            for tensor in (*weights, scores):
                assert not bool((tensor == float(SECRET[0])).any()), "the secret was read"
        else:
            assert error.what and "\n" not in error.what and "Traceback" not in str(error)
            assert "31337" not in str(error)
        return error


_SEEN: list[list[tuple[str, str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _SEEN and (event == "open" or event in _EXECUTING):
        _SEEN[-1].append((event, os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""))


sys.addaudithook(_audit)


@contextlib.contextmanager
def _watched() -> Iterator[list[tuple[str, str]]]:
    """What Python itself opens and executes meanwhile, in this process."""
    _SEEN.append([])
    try:
        yield _SEEN[-1]
    finally:
        _SEEN.pop()


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """An exception that nothing catches where it takes far too long."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """That this process's memory does not grow out of all proportion, where the system can tell."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        yield
        return
    peak.write_text("5")
    start = _high_water()
    yield
    assert _high_water() - start < _MEMORY, "it filled the memory"


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
