"""Where units of work run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from backdoorscan.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from backdoorscan.classifier import Classifier
    from backdoorscan.engine.crew import Died, Say
    from backdoorscan.findings import Evidence, Unit
    from backdoorscan.images import LabelledImages
    from backdoorscan.plugin.detector import Detector
    from backdoorscan.plugin.method import Context

ENGINES = ("local", "ray")

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Other machines to work on. What comes of it is the same as from ``engine.local`` and ``engine.crew`` here."""

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the other machines have spent on finished work so far."""

    def run(
        self,
        detector: Detector,
        units: Sequence[Unit],
        classifier: Classifier,
        images: LabelledImages | None,
        context: Context,
        keep: Callable[[Unit, Evidence], None] = ...,
    ) -> Generator[tuple[Unit, Evidence]]:
        """Examine each unit: see ``engine.local.run``."""

    def spread(
        self,
        work: Callable[[Shared, Task, Say], Result],
        shared: Shared,
        tasks: Iterable[Task],
        heard: Callable[[int, Any], None],
    ) -> Generator[tuple[int, Result | Died]]:
        """Do the tasks, each of which is taken when there is room for it: see ``engine.crew.spread``."""


def named(name: str, address: str | None = None, device: str = "cpu") -> Engine | None:
    """The engine of this name; ``None`` is this machine.

    Args:
        name: One of ``ENGINES``.
        address: Of a Ray cluster; ``None`` for ``RAY_ADDRESS``, else the cluster that this machine is part of, else a
            new one of this machine alone.
        device: Where networks compute there.

    Raises:
        UsageError: There is no such engine, it is not installed, or nothing answers at the address.
    """
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    if name == "local":
        if address is not None:
            raise UsageError(f"--ray-address {address} is of use only with --engine ray.", hint="Add --engine ray.")
        return None
    try:
        from backdoorscan.engine.ray import Cluster
    except ModuleNotFoundError as error:
        raise UsageError(
            "--engine ray needs Ray.", why=str(error), hint="Install it: pip install 'backdoorscan[ray]'"
        ) from error
    return Cluster(address, device)
