"""Where units of work run: here, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

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
) -> Iterator[tuple[Unit, Evidence]]:
    """Examine each unit and yield its evidence as it comes.

    Raises:
        MethodError: The detector failed on a unit, or the deadline has passed.
    """
    for position, unit in enumerate(units):
        inner = replace(context, progress=_watched(detector, context, position, len(units)))
        _keep_deadline(detector, context)
        yield unit, guarded(detector, unit.id, partial(detector.examine, unit, classifier, images, inner))
        context.progress((position + 1) / len(units))


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
