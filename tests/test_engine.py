import time
from dataclasses import dataclass

import pytest

from backdoorscan.engine import local
from backdoorscan.errors import ImagesError, MethodError
from backdoorscan.findings import Evidence, Judgement, Unit
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context

UNITS = [Unit("a", (0,)), Unit("b", (1,)), Unit("c", (2,))]


@dataclass(frozen=True, kw_only=True)
class Fake(Detector):
    """Says which unit it saw."""

    id = "fake"
    error: Exception | None = None

    def examine(self, unit, classifier, images, context):
        if self.error and unit.id == "b":
            raise self.error
        context.progress(0.5)
        return Evidence(figures={"unit": unit.id, "classifier": classifier, "images": images, "seed": context.seed})

    def judge(self, evidence):
        return Judgement(p_value=None)


def run(detector=None, **context):
    return list(local.run(detector or Fake(), UNITS, "net", "images", Context(**context)))


def test_every_unit_is_examined_once_with_what_it_needs():
    results = run(seed=7)
    assert [unit for unit, _ in results] == UNITS
    assert [evidence.figures for _, evidence in results] == [
        {"unit": unit.id, "classifier": "net", "images": "images", "seed": 7} for unit in UNITS
    ]


def test_evidence_comes_as_soon_as_it_is_there():
    stream = local.run(Fake(error=ValueError()), UNITS, "net", None, Context())
    assert next(stream)[0] == UNITS[0]
    with pytest.raises(MethodError):
        next(stream)


def test_progress_is_that_of_all_units():
    told = []
    run(progress=told.append)
    assert told == pytest.approx([1 / 6, 1 / 3, 3 / 6, 2 / 3, 5 / 6, 1])


def test_any_exception_becomes_a_method_error():
    with pytest.raises(MethodError) as caught:
        run(Fake(error=ValueError("odd")))
    assert caught.value.what == "fake failed on b."
    assert caught.value.why == "ValueError: odd"


def test_our_own_errors_pass():
    with pytest.raises(ImagesError, match="too few"):
        run(Fake(error=ImagesError("too few")))


def test_an_interrupt_passes():
    with pytest.raises(KeyboardInterrupt):
        run(Fake(error=KeyboardInterrupt()))


def test_nothing_starts_after_the_deadline():
    with pytest.raises(MethodError, match="ran out of time"):
        run(deadline=time.monotonic())
    assert len(run(deadline=time.monotonic() + 60)) == 3


def test_no_units_no_evidence():
    assert list(local.run(Fake(), [], "net", None, Context())) == []
