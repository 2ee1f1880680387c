"""Where units of work run: here, one after the other or some at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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


def run(
    detector: Detector,
    units: Sequence[Unit],
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    jobs: int = 1,
) -> Iterator[tuple[Unit, Evidence]]:
    """Examine each unit and yield its evidence as it comes, not always in the order of the units.

    Args:
        detector: Whose units they are.
        units: The pieces of work.
        classifier: The network; with several jobs each works on a copy of its own.
        images: Clean images.
        context: The run. Its progress is told from one thread only.
        jobs: Units worked on at a time, each with one computing thread.

    Raises:
        MethodError: The detector failed on a unit, or the deadline has passed.
    """
    if jobs > 1 and len(units) > 1:
        yield from _side_by_side(detector, units, classifier, images, context, min(jobs, len(units)))
        return
    for position, unit in enumerate(units):
        inner = replace(context, progress=_watched(detector, context, position, len(units)))
        _keep_deadline(detector, context)
        yield unit, guarded(detector, unit.id, partial(detector.examine, unit, classifier, images, inner))
        context.progress((position + 1) / len(units))


def _side_by_side(
    detector: Detector,
    units: Sequence[Unit],
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    jobs: int,
) -> Iterator[tuple[Unit, Evidence]]:
    own, ended = threading.local(), threading.Event()

    def begin() -> None:
        torch.set_num_threads(1)  # counts per thread: a new one would take all cores
        own.classifier = classifier.clone()

    def keep_on(_fraction: float) -> None:
        _keep_deadline(detector, context)
        if ended.is_set():
            raise MethodError(f"{detector.id} was ended.")

    def examine(unit: Unit) -> Evidence:
        keep_on(0.0)
        inner = replace(context, progress=keep_on)
        return guarded(detector, unit.id, partial(detector.examine, unit, own.classifier, images, inner))

    with ThreadPoolExecutor(jobs, initializer=begin) as pool:
        waiting = {pool.submit(examine, unit): unit for unit in units}
        try:
            for done, future in enumerate(as_completed(waiting), start=1):
                yield waiting[future], future.result()
                context.progress(done / len(units))
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
        raise MethodError(f"{detector.id} ran out of time.", hint="Raise --timeout or restrict --labels.")


def _watched(detector: Detector, context: Context, position: int, count: int) -> Callable[[float], None]:
    """A unit's own progress as a part of all units'; whoever reports progress also keeps the deadline."""

    def progress(fraction: float) -> None:
        _keep_deadline(detector, context)
        context.progress((position + fraction) / count)

    return progress
