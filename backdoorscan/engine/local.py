"""Where units of work run: here, one after the other or some at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from backdoorscan.classifier import Classifier
from backdoorscan.engine.checking import sound_evidence
from backdoorscan.errors import BackdoorscanError, MethodError
from backdoorscan.findings import Evidence, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context

T = TypeVar("T")

_LOOK_EVERY = 0.25
"""Seconds after which what units in threads tell of their progress is passed on, and the deadline is looked at."""

_GRACE = 5.0
"""Seconds that units have to end in when they are not wanted any more; then they are left to themselves."""


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
        jobs: Units worked on at a time, if several each with one computing thread.
        keep: Told of each unit as soon as it is finished, by the thread that worked on it.

    Raises:
        MethodError: The detector failed on a unit, or the deadline has passed.
    """
    jobs = min(jobs, len(units))
    if jobs > 1 or (units and context.deadline is not None):
        _keep_deadline(detector, context)
        yield from _apart(detector, units, classifier, images, context, jobs, keep)
        return
    for position, unit in enumerate(units):
        inner = replace(context, progress=_watched(context, position, len(units)))
        evidence = examined(detector, unit, classifier, images, inner)
        keep(unit, evidence)
        yield unit, evidence
        context.progress((position + 1) / len(units))


def _apart(
    detector: Detector,
    units: Sequence[Unit],
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    jobs: int,
    keep: Callable[[Unit, Evidence], None],
) -> Iterator[tuple[Unit, Evidence]]:
    """Examine the units in threads, so that a deadline and Ctrl-C end even a method that never tells its progress."""
    ended, threads = threading.Event(), 1 if jobs > 1 else torch.get_num_threads()
    parts = dict.fromkeys((unit.id for unit in units), 0.0)
    waiting: SimpleQueue[Unit] = SimpleQueue()
    done: SimpleQueue[tuple[Unit, Evidence | BaseException]] = SimpleQueue()
    for unit in units:
        waiting.put(unit)

    def keep_on(name: str, fraction: float) -> None:
        _keep_deadline(detector, context)
        if ended.is_set():
            raise MethodError(f"{detector.id} was ended.")
        parts[name] = fraction

    def work() -> None:
        torch.set_num_threads(threads)  # counts per thread: a new one would take all cores
        own = None if jobs > 1 else classifier
        with suppress(Empty):
            while not ended.is_set():
                unit = waiting.get_nowait()
                try:
                    keep_on(unit.id, 0.0)
                    if own is None:
                        own = guarded(detector, "copying the network", classifier.clone)
                    inner = replace(context, progress=partial(keep_on, unit.id))
                    evidence = examined(detector, unit, own, images, inner)
                    keep(unit, evidence)
                    parts[unit.id] = 1.0
                    done.put((unit, evidence))
                except BaseException as error:
                    done.put((unit, error))

    # Not a pool's: those are waited for when the program ends, however long they take.
    crew = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in crew:
        thread.start()
    left = len(units)
    try:
        while left:
            with suppress(Empty):
                unit, result = done.get(timeout=_LOOK_EVERY)
                if isinstance(result, BaseException):
                    raise result
                left -= 1
                yield unit, result
            context.progress(sum(parts.values()) / len(units))
            if left:
                _keep_deadline(detector, context)
    finally:
        ended.set()
        patience = time.monotonic() + _GRACE
        for thread in crew:
            thread.join(max(0.0, patience - time.monotonic()))


def examined(
    detector: Detector, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context
) -> Evidence:
    """The evidence of one unit.

    Raises:
        MethodError: The detector failed, or what it returned is no sound evidence.
    """
    evidence = guarded(detector, unit.id, partial(detector.examine, unit, classifier, images, context))
    return sound_evidence(detector, unit, evidence, classifier)


def guarded(detector: Detector, doing: str, work: Callable[[], T]) -> T:
    """Run a part of a detector; whatever a stranger's code raises becomes a ``MethodError``.

    Raises:
        MethodError: It failed.
    """
    try:
        return work()
    except BackdoorscanError:
        raise
    except (Exception, SystemExit) as error:  # a method that ends the program would choose its exit code
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


def _watched(context: Context, position: int, count: int) -> Callable[[float], None]:
    """A unit's own progress as a part of all units'."""
    return lambda fraction: context.progress((position + fraction) / count)
