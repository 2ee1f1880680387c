"""Where units of work run: here, one after the other or some at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from backdoorscan.classifier import Classifier
from backdoorscan.errors import BackdoorscanError, MethodError
from backdoorscan.findings import Evidence, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context

T = TypeVar("T")

_LOOK_EVERY = 0.25
"""Seconds after which what units that run side by side tell of their progress is passed on."""


def _forget(_unit: Unit, _evidence: Evidence) -> None:
    """Nothing is kept."""


def run(
    detector: Detector,
    units: Sequence[Unit],
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    jobs: int = 1,
    keep: Callable[[Unit, Evidence], None] = _forget,
) -> Iterator[tuple[Unit, Evidence]]:
    """Examine each unit and yield its evidence as it comes, not always in the order of the units.

    Args:
        detector: Whose units they are.
        units: The pieces of work.
        classifier: The network; with several jobs each works on a copy of its own.
        images: Clean images.
        context: The run. Its progress is told from one thread only.
        jobs: Units worked on at a time, each with one computing thread.
        keep: Told of each unit as soon as it is finished, by the thread that worked on it.

    Raises:
        MethodError: The detector failed on a unit, or the deadline has passed.
    """
    if jobs > 1 and len(units) > 1:
        yield from _side_by_side(detector, units, classifier, images, context, min(jobs, len(units)), keep)
        return
    for position, unit in enumerate(units):
        inner = replace(context, progress=_watched(detector, context, position, len(units)))
        _keep_deadline(detector, context)
        evidence = guarded(detector, unit.id, partial(detector.examine, unit, classifier, images, inner))
        keep(unit, evidence)
        yield unit, evidence
        context.progress((position + 1) / len(units))


def _side_by_side(
    detector: Detector,
    units: Sequence[Unit],
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    jobs: int,
    keep: Callable[[Unit, Evidence], None],
) -> Iterator[tuple[Unit, Evidence]]:
    own, ended = threading.local(), threading.Event()
    parts = dict.fromkeys((unit.id for unit in units), 0.0)

    def begin() -> None:
        torch.set_num_threads(1)  # counts per thread: a new one would take all cores

    def keep_on(name: str, fraction: float) -> None:
        _keep_deadline(detector, context)
        if ended.is_set():
            raise MethodError(f"{detector.id} was ended.")
        parts[name] = fraction

    def examine(unit: Unit) -> Evidence:
        keep_on(unit.id, 0.0)
        if not hasattr(own, "classifier"):
            own.classifier = guarded(detector, "copying the network", classifier.clone)
        inner = replace(context, progress=partial(keep_on, unit.id))
        evidence = guarded(detector, unit.id, partial(detector.examine, unit, own.classifier, images, inner))
        keep(unit, evidence)
        parts[unit.id] = 1.0
        return evidence

    with ThreadPoolExecutor(jobs, initializer=begin) as pool:
        waiting = {pool.submit(examine, unit): unit for unit in units}
        try:
            while waiting:
                done, _ = wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
                context.progress(sum(parts.values()) / len(units))
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)


def guarded(detector: Detector, doing: str, work: Callable[[], T]) -> T:
    """Run a part of a detector; whatever a stranger's code raises becomes a ``MethodError``.

    Raises:
        MethodError: It failed.
    """
    try:
        return work()
    except BackdoorscanError:
        raise
    except Exception as error:
        raise MethodError(
            f"{detector.id} failed on {doing}.",
            why=f"{type(error).__name__}: {error}",
            hint="Please report this to the method's author; -v shows where it happened.",
        ) from error


def _keep_deadline(detector: Detector, context: Context) -> None:
    if context.out_of_time:
        raise MethodError(
            f"{detector.id} ran out of time.", hint="Raise --timeout or restrict --labels; --resume goes on."
        )


def _watched(detector: Detector, context: Context, position: int, count: int) -> Callable[[float], None]:
    """A unit's own progress as a part of all units'; whoever reports progress also keeps the deadline."""

    def progress(fraction: float) -> None:
        _keep_deadline(detector, context)
        context.progress((position + fraction) / count)

    return progress
