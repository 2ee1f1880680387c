"""Where units of work run: here, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from backdoorscan.classifier import Classifier
from backdoorscan.errors import BackdoorscanError, MethodError
from backdoorscan.findings import Evidence, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context


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
        if context.deadline is not None and time.monotonic() >= context.deadline:
            raise MethodError(f"{detector.id} ran out of time.", hint="Raise --timeout or restrict --labels.")
        inner = replace(context, progress=_scaled(context.progress, position, len(units)))
        try:
            evidence = detector.examine(unit, classifier, images, inner)
        except BackdoorscanError:
            raise
        except Exception as error:
            raise MethodError(
                f"{detector.id} failed on {unit.id}.",
                why=f"{type(error).__name__}: {error}",
                hint="Please report this to the method's author; -v shows where it happened.",
            ) from error
        yield unit, evidence
        context.progress((position + 1) / len(units))


def _scaled(progress: Callable[[float], None], position: int, count: int) -> Callable[[float], None]:
    """A unit's own progress as a part of all units'."""
    return lambda fraction: progress((position + fraction) / count)
