"""Units side by side."""

import _thread
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from backdoorscan.engine import local
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Judgement, Unit
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context

UNITS = [Unit(str(number), (number,)) for number in range(6)]


class Net:
    """Can be copied, or not."""

    def __init__(self, copies=True):
        self.copies = copies

    def clone(self):
        if not self.copies:
            raise RuntimeError("cannot be copied")
        return Net()


@dataclass(frozen=True, kw_only=True)
class Fake(Detector):
    """Two of its units wait for each other."""

    id = "fake"
    gate: Any = field(default_factory=lambda: threading.Barrier(2))
    failing: str = ""

    def examine(self, unit, classifier, images, context):
        context.progress(0.5)
        if unit.id in ("0", "1"):
            self.gate.wait(timeout=30)
        if unit.id == self.failing:
            raise ValueError("odd")
        return Evidence(figures={"thread": threading.get_ident(), "net": id(classifier)})

    def judge(self, evidence):
        return Judgement(p_value=None)


def test_units_run_at_the_same_time_each_thread_on_its_own_copy():
    net = Net()
    results = {unit.id: part for unit, part in local.run(Fake(), UNITS, net, None, Context(), 2)}
    assert sorted(results) == [unit.id for unit in UNITS]
    assert results["0"].figures["thread"] != results["1"].figures["thread"]
    assert results["0"].figures["net"] != results["1"].figures["net"]
    assert id(net) not in {part.figures["net"] for part in results.values()}


def test_progress_is_told_from_one_thread_and_ends_at_one():
    told, threads = [], set()

    def progress(part):
        told.append(part)
        threads.add(threading.get_ident())

    list(local.run(Fake(), UNITS, Net(), None, Context(progress=progress), 2))
    assert threads == {threading.get_ident()}
    assert told[-1] == pytest.approx(1)
    assert told == sorted(told)


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_finished_unit_is_kept_before_it_is_passed_on(jobs):
    kept = []
    fake = Fake(gate=threading.Barrier(jobs))
    for unit, part in local.run(fake, UNITS, Net(), None, Context(), jobs, lambda *pair: kept.append(pair)):
        assert (unit, part) in kept
    assert sorted(unit.id for unit, _ in kept) == [unit.id for unit in UNITS]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_keeps_what_was_finished(jobs):
    kept = []
    fake = Fake(gate=threading.Barrier(jobs), failing="4")
    with pytest.raises(MethodError, match="fake failed on 4"):
        list(local.run(fake, UNITS, Net(), None, Context(), jobs, lambda unit, _: kept.append(unit.id)))
    assert {"0", "1", "2", "3"} <= set(kept)
    assert "4" not in kept


def test_a_network_that_cannot_be_copied():
    with pytest.raises(MethodError, match="copying the network"):
        list(local.run(Fake(), UNITS, Net(copies=False), None, Context(), 2))


@dataclass(frozen=True, kw_only=True)
class Busy(Detector):
    """Draws seeded numbers; one unit may fail, and the others wait until they are told to end."""

    id = "busy"
    failing: str = ""
    failed: Any = field(default_factory=threading.Event)
    begun: Any = field(default_factory=list)

    def examine(self, unit, classifier, images, context):
        self.begun.append(unit.id)
        if unit.id == self.failing:
            self.failed.set()
            raise ValueError("odd")
        numbers = torch.rand(3, generator=context.generator(self.id, unit.id))
        for step in range(200 if self.failing else 1):
            context.progress(step / 200)
            if self.failing:
                time.sleep(0.05)
        return Evidence(figures={"numbers": numbers.tolist(), "threads": torch.get_num_threads()})

    def judge(self, evidence):
        return Judgement(p_value=None)


def test_the_result_does_not_depend_on_the_number_of_jobs():
    results = [
        {unit.id: part.figures for unit, part in local.run(Busy(), UNITS, Net(), None, Context(seed=3), jobs)}
        for jobs in (1, 3)
    ]
    assert results[0] == results[1]
    assert [figures["threads"] for figures in results[1].values()] == [1] * len(UNITS)


def test_a_failing_unit_ends_the_others():
    busy = Busy(failing="1")
    with pytest.raises(MethodError, match="busy failed on 1"):
        list(local.run(busy, UNITS, Net(), None, Context(), 2))
    # The unit beside it is ended where it next tells its progress, and what waits is not begun.
    assert {"0", "1"} <= set(busy.begun)
    assert "5" not in busy.begun


@dataclass(frozen=True, kw_only=True)
class Hanging(Busy):
    """Two of its units never end and never tell their progress."""

    id = "hanging"
    begun: Any = field(default_factory=threading.Event)
    end: Any = field(default_factory=threading.Event)

    def examine(self, unit, classifier, images, context):
        if unit.id in ("1", "2"):
            self.begun.set()
            self.end.wait()
        return Evidence(figures={})


@pytest.fixture
def hanging(monkeypatch):
    monkeypatch.setattr(local, "_GRACE", 0.1)
    detector = Hanging()
    yield detector
    detector.end.set()


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_deadline_ends_a_unit_that_never_tells_its_progress(hanging, jobs):
    kept = []
    context = Context(deadline=time.monotonic() + 0.5)
    with pytest.raises(MethodError, match="hanging ran out of time"):
        list(local.run(hanging, UNITS, Net(), None, context, jobs, lambda unit, _: kept.append(unit.id)))
    assert hanging.begun.is_set()
    assert "0" in kept


def test_ctrl_c_ends_units_side_by_side_that_never_tell_their_progress(hanging):
    def press():
        hanging.begun.wait()
        _thread.interrupt_main()

    presses = threading.Thread(target=press)
    presses.start()
    with pytest.raises(KeyboardInterrupt):
        list(local.run(hanging, UNITS, Net(), None, Context(), 2))
    presses.join()


def test_with_a_deadline_the_result_is_the_same():
    plain, timed = (
        {unit.id: part.figures["numbers"] for unit, part in local.run(Busy(), UNITS, Net(), None, context)}
        for context in (Context(seed=3), Context(seed=3, deadline=time.monotonic() + 600))
    )
    assert plain == timed
