"""Units of work, or whole models, on a Ray cluster.

Ray decides where and when each runs, and runs again what a lost worker or node was at. An error of ours, or of a
detector, comes back as a value: it would only come again.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.machinery import PathFinder
from itertools import islice
from time import process_time
from typing import Any, TypeVar

import ray
import torch
from torch import fx

from backdoorscan.classifier import Classifier
from backdoorscan.costing import versions
from backdoorscan.engine import local
from backdoorscan.engine.crew import Died, Say
from backdoorscan.engine.packing import PackedClassifier, pack
from backdoorscan.errors import BackdoorscanError, MethodError, UsageError
from backdoorscan.findings import Evidence, Unit
from backdoorscan.formats.devices import find_device
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

RETRIES = 3
"""Times that Ray runs something again whose worker was lost."""

_LOOK_EVERY = 0.25
"""Seconds between two looks at the deadline."""

_AHEAD = 2
"""Pieces of work handed out for each core, or part of a GPU, of the cluster: one in work, one ready."""

_GPU_SHARE = 0.25
"""Of a GPU, for a piece of work: small networks alone do not fill one."""

_SAME = "Install the same packages, plugins included, on every node."


@dataclass(frozen=True)
class _Error:
    """An error of ours on its way: some cannot be pickled."""

    kind: type[BackdoorscanError]
    facts: dict[str, Any]

    def rebuilt(self) -> BackdoorscanError:
        error = self.kind.__new__(self.kind, self.facts["what"])
        error.__dict__.update(self.facts)
        return error


@dataclass(frozen=True)
class _Answer:
    """What a worker sends back: the value or an error, and the processor time it took in seconds."""

    value: Any
    error: _Error | None
    cpu_seconds: float

    def get(self) -> Any:
        if self.error:
            raise self.error.rebuilt()
        return self.value


class Cluster:
    """An ``engine.Engine`` on a Ray cluster, of one computing thread for each piece of work.

    Args:
        address: The cluster's; ``None`` for ``RAY_ADDRESS``, else the one that this machine is part of, else a new one
            of this machine alone, which ends with this process. If this process is connected already, that one.
        device: Where networks compute: on anything but ``cpu``, pieces of work take a part of a node's GPU each.

    Raises:
        UsageError: Nothing answers at the address, or a cluster of other versions.
    """

    def __init__(self, address: str | None = None, device: str = "cpu") -> None:
        self.cpu_seconds = 0.0
        self._device = device
        self._resource, self._share = ("CPU", 1.0) if device == "cpu" else ("GPU", _GPU_SHARE)
        self._do = ray.remote(num_cpus=1, num_gpus=0 if device == "cpu" else _GPU_SHARE)(_do)
        self._placed: tuple[Classifier, LabelledImages | None, Any] | None = None
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = address or os.environ.get("RAY_ADDRESS")
            try:
                _knock(address)
                # What workers print must not come between the lines of a report.
                ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise UsageError(
                    "Cannot connect to the Ray cluster" + (f" at {address}." if address else "."),
                    why=str(error).strip().partition("\n")[0],
                    hint="Start one with: ray start --head; see docs/scaling.md.",
                ) from error

    def run(
        self,
        detector: Detector,
        units: Sequence[Unit],
        classifier: Classifier,
        images: LabelledImages | None,
        context: Context,
        keep: Callable[[Unit, Evidence], None] = lambda _unit, _evidence: None,
    ) -> Generator[tuple[Unit, Evidence]]:
        """Examine each unit and yield its evidence as it comes, not always in the order of the units.

        Args:
            detector: Whose units they are.
            units: The pieces of work.
            classifier: The network, sent once for all detectors of a scan; each unit works on a copy of its own.
            images: Clean images, sent with it.
            context: The run. Its deadline is kept here, and its progress counts finished units.
            keep: Told of each unit as soon as it is back.

        Raises:
            MethodError: The detector failed on a unit, the deadline has passed, or a unit's worker was lost again and
                again.
            UsageError: A node has other versions of what the figures depend on.
        """
        keep_deadline = partial(local._keep_deadline, detector, context)
        keep_deadline()
        place = self._place(classifier, images)
        told = ray.put((detector, replace(context, progress=Context().progress, deadline=None)))
        calls = ((_examine, place, told, unit, self._device) for unit in units)
        for count, (number, answer) in enumerate(self._answers(calls, keep_deadline), start=1):
            unit = units[number]
            if isinstance(answer, Died):
                raise MethodError(f"{detector.id} failed on {unit.id}.", why=answer.why, hint=_SAME)
            evidence = answer.get()
            keep(unit, evidence)
            yield unit, evidence
            context.progress(count / len(units))

    def spread(
        self,
        work: Callable[[Shared, Task, Say], Result],
        shared: Shared,
        tasks: Iterable[Task],
        heard: Callable[[int, Any], None],
    ) -> Generator[tuple[int, Result | Died]]:
        """Do the tasks and yield the number and the result of each as it comes.

        Args:
            work: A function of a module, which does not raise.
            shared: What every task needs; each node gets a copy once.
            tasks: Plain data, each taken when there is room for it.
            heard: Told the number of a task and what ``work`` said during it, when it is done.

        Raises:
            UsageError: A node has other versions of what the figures depend on.
        """
        place = ray.put(shared)
        calls = ((_listen, work, place, task) for task in tasks)
        for number, answer in self._answers(calls, lambda: None):
            if isinstance(answer, Died):
                yield number, answer
                continue
            result, said = answer.get()
            for message in said:
                heard(number, message)
            yield number, result

    def _place(self, classifier: Classifier, images: LabelledImages | None) -> Any:
        if self._placed is None or self._placed[0] is not classifier or self._placed[1] is not images:
            for name in _homemade(classifier):
                ray.cloudpickle.register_pickle_by_value(sys.modules[name])
            self._placed = classifier, images, ray.put((pack(classifier), images))
        return self._placed[2]

    def _answers(
        self, calls: Iterable[tuple[Any, ...]], look: Callable[[], None]
    ) -> Generator[tuple[int, _Answer | Died]]:
        """Hand the calls out as there is room, and yield each one's number and answer as it comes."""
        remote, expected = self._do.options(max_retries=RETRIES), versions()
        coming, waiting = enumerate(calls), dict[Any, int]()
        try:
            while True:
                found = ray.cluster_resources().get(self._resource, 0)  # nodes come and go
                room = _AHEAD * max(1, int(found / self._share))
                for number, call in islice(coming, max(0, room - len(waiting))):
                    waiting[remote.remote(expected, *call)] = number
                if not waiting:
                    return
                done, _ = ray.wait(list(waiting), timeout=_LOOK_EVERY)
                for reference in done:
                    yield waiting.pop(reference), self._answer(reference)
                look()
        finally:
            for reference in waiting:
                ray.cancel(reference)

    def _answer(self, reference: Any) -> _Answer | Died:
        try:
            answer: _Answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            return Died(f"A node cannot do it: {str(error).strip().splitlines()[-1]}")
        except ray.exceptions.RayError as error:
            return Died(f"Its worker was lost, {RETRIES} times again after the first ({type(error).__name__}).")
        self.cpu_seconds += answer.cpu_seconds
        return answer


def _knock(address: str | None) -> None:
    """Raise at once where nothing listens: Ray itself would try for minutes and then end the process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), 10).close()


def _homemade(classifier: Classifier) -> set[str]:
    """Modules that the network's code is from and that no worker can import: files given with ``--arch``."""
    names = {type(module).__module__ for module in classifier.modules()}
    if isinstance(classifier.network, fx.GraphModule):
        names |= {str(getattr(node.target, "__module__", "")) for node in classifier.network.graph.nodes}
    files = {name for name in names if getattr(sys.modules.get(name), "__file__", None)}
    return {name for name in files if PathFinder.find_spec(name.partition(".")[0]) is None}


def _do(expected: dict[str, str], work: Callable[..., Any], *arguments: Any) -> _Answer:
    """On a worker: do it."""
    started = process_time()
    torch.set_num_threads(1)
    try:
        if versions() != expected:
            raise UsageError(f"A node has {_told(versions())}; here are {_told(expected)}.", hint=_SAME)
        value, error = work(*arguments), None
    except BackdoorscanError as raised:
        value, error = None, _Error(type(raised), raised.__dict__)
    return _Answer(value, error, process_time() - started)


def _told(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _examine(
    place: tuple[PackedClassifier, LabelledImages | None], told: tuple[Detector, Context], unit: Unit, device: str
) -> Evidence:
    (packed, images), (detector, context) = place, told
    return local.examined(detector, unit, packed.unpack().to(find_device(device)), images, context)


def _listen(work: Callable[[Any, Any, Say], Any], shared: Any, task: Any) -> tuple[Any, list[Any]]:
    said: list[Any] = []
    return work(shared, task, said.append), said
