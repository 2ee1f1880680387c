"""Scans that go on, scans that are answered from the cache, and scans that make their own images."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from backdoorscan import scan, scanning
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.reports.json import Json
from backdoorscan.scanning import ScanOptions
from backdoorscan.trigger import Trigger


@dataclass(frozen=True, kw_only=True)
class Counting(Detector):
    """Notes which units it runs; works in two rounds, of which the second goes on from the first."""

    id = "counting"
    seen: ClassVar[list[str]] = []
    stop_at: ClassVar[str] = ""

    scale: float = option(1.0, help="Of the triggers.")

    def units(self, classifier, context):
        return [Unit(f"first {label}", (label,)) for label in range(classifier.num_classes)]

    def more_units(self, evidence, classifier, context):
        if len(evidence) > classifier.num_classes:
            return ()
        return [Unit(f"second {t.target}", (t.target,), 1, (t,)) for part in evidence for t in part.triggers]

    def examine(self, unit, classifier, images, context):
        if unit.id == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(f"{self.id} {unit.id}")
        drawn = torch.rand(1, *classifier.input_shape[1:], generator=context.generator(self.id, unit.id))
        mask = (drawn + unit.starts[0].mask) / 2 if unit.starts else drawn
        trigger = Trigger(self.scale * mask, mask.expand(classifier.input_shape).clone(), unit.labels[0])
        return Evidence(figures={"l1": trigger.l1}, triggers=[trigger], gradient_samples=3)

    def judge(self, evidence):
        sizes = [part.triggers[0].l1 for part in evidence]
        return Judgement(
            findings=[Finding(target_label=1, p_value=0.5, score=max(sizes))],
            p_value=0.5,
            ranking=[1, 0],
            figures={"sum": sum(sizes)},
        )


@dataclass(frozen=True, kw_only=True)
class After(Counting):
    """Runs after the other and is told what it found."""

    id = "after"
    cost = 2.0

    def examine(self, unit, classifier, images, context):
        evidence = super().examine(unit, classifier, images, context)
        return replace(evidence, figures={**evidence.figures, "told": context.earlier["counting"].judgement.ranking[0]})


UNITS = [
    f"{detector} {turn} {label}"
    for detector in ("counting", "after")
    for turn in ("first", "second")
    for label in range(5)
]


@pytest.fixture
def counted(monkeypatch):
    """What was run since the last look."""
    monkeypatch.setattr(Counting, "seen", [])
    monkeypatch.setattr(Counting, "stop_at", "")

    def look():
        seen = sorted(Counting.seen)
        Counting.seen.clear()
        return seen

    return look


@pytest.fixture
def told():
    return []


@pytest.fixture
def run(model_file, registry_of, tmp_path, told):
    """``run(resume=True, seed=3)``: a scan that uses the cache."""
    file = model_file(None)

    def start(
        *, detectors=(Counting, After), images=file.images, read=file.read, path=file.path, keeping=None, **options
    ):
        kept = {key: options.pop(key) for key in ("reports", "resume") if key in options}
        keeping = keeping or Keeping(tmp_path / "kept", tell=told.append, **kept)
        registry = registry_of(detectors=list(detectors))
        return scan(path, images, read, ScanOptions(**options), registry=registry, keeping=keeping)

    return start


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("cost", "seconds")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def plain(report):
    return without_times(report.to_json())


@pytest.mark.parametrize("jobs", [1, 2, 3])
@pytest.mark.parametrize("stop", ["counting first 3", "counting second 0", "after first 0", "after second 4"])
def test_an_interrupted_scan_goes_on_with_no_unit_lost_and_none_run_twice(run, counted, told, stop, jobs, monkeypatch):
    whole = plain(run(reports=False))
    assert counted() == sorted(UNITS)
    detector, unit = stop.split(" ", 1)
    monkeypatch.setattr({"counting": Counting, "after": After}[detector], "stop_at", unit, raising=False)
    if detector == "after":
        monkeypatch.setattr(Counting, "stop_at", "")
    with pytest.raises(KeyboardInterrupt):
        run(jobs=jobs)
    before = counted()
    monkeypatch.setattr(Counting, "stop_at", "")
    monkeypatch.setattr(After, "stop_at", "")
    again = run(resume=True, jobs=jobs)
    assert before
    assert sorted(before + counted()) == sorted(UNITS)
    assert f"resuming: {len(before)} finished unit{'s' * (len(before) > 1)} taken over" in told
    assert plain(again) == whole
    assert again.cost.gradient_samples == 60


def test_without_resume_it_begins_again(run, counted, told, monkeypatch, tmp_path):
    monkeypatch.setattr(Counting, "stop_at", "first 3")
    with pytest.raises(KeyboardInterrupt):
        run(detectors=[Counting])
    assert len(counted()) == 3
    monkeypatch.setattr(Counting, "stop_at", "first 1")
    with pytest.raises(KeyboardInterrupt):
        run(detectors=[Counting])
    (journal,) = (tmp_path / "kept" / "journals").iterdir()
    assert len(journal.read_text().splitlines()) == 1
    assert told == []


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"labels": (0, 1, 2, 3, 4)},
        {"settings": {"counting": {"scale": 0.5}}},
        {"detectors": [Counting, After]},
        {"read": "0,1"},
        {"images": "other"},
        {"path": "other"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_scan_takes_nothing_over(run, counted, told, other, monkeypatch, model_file):
    monkeypatch.setattr(Counting, "stop_at", "first 3")
    with pytest.raises(KeyboardInterrupt):
        run(detectors=[Counting])
    counted()
    monkeypatch.setattr(Counting, "stop_at", "")
    file = model_file(None)
    if "read" in other:
        other = {"read": replace(file.read, input_range=(0.0, 1.0))}
    elif "images" in other:
        other = {"images": file.images.take(np.arange(50))}
    elif "path" in other:
        other = {"path": model_file(2).path}
    run(**{"detectors": [Counting], "resume": True, **other})
    assert "counting first 0" in counted()
    assert told == ["nothing to resume: no finished unit of this scan is kept"]


def test_what_ran_out_of_time_can_go_on(run, counted, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Failing(Counting):
        """Fails until it is mended."""

        id = "failing"
        broken: ClassVar[bool] = True

        def examine(self, unit, classifier, images, context):
            if self.broken and unit.id == "first 3":
                raise MethodError("failing ran out of time.")
            return super().examine(unit, classifier, images, context)

    assert not run(detectors=[Failing]).complete
    counted()
    monkeypatch.setattr(Failing, "broken", False)
    assert run(detectors=[Failing], resume=True).complete
    assert len(counted()) == 7


def test_any_number_of_jobs_gives_the_same_report(run, model_file, registry_of):
    reports = [plain(run(jobs=jobs, reports=False)) for jobs in (1, 2, 4)]
    assert reports[0] == reports[1] == reports[2]
    file = model_file(2)
    quick = {"neural-cleanse": {"steps": 12, "batch_size": 128}}  # one label per unit
    options = ScanOptions(detectors=["neural-cleanse"], settings=quick)
    one, two = (scan(file.path, file.images, file.read, replace(options, jobs=jobs)) for jobs in (1, 2))
    assert len(one.runs[0].detectors[0].evidence["units"]) == 5
    assert plain(one) == plain(two)


def rendered(report):
    return Json().render(report, Terminal())


def test_a_second_scan_is_answered_from_the_cache(run, counted, told, tmp_path):
    first = run()
    assert counted()
    second = run()
    assert counted() == []
    assert (first.cached, second.cached) == (False, True)
    anew = replace(second, cached=False, runs=[replace(run, cached=False) for run in second.runs])
    assert rendered(anew) == rendered(first)
    (line,) = told
    assert line.startswith("answered from the cache, made on 20")
    assert list((tmp_path / "kept" / "journals").iterdir()) == []
    run(jobs=2, timeout=1000.0, resume=True)
    assert counted() == []


def test_the_paths_are_those_of_the_present_call(run, tmp_path, model_file):
    file = model_file(None)
    run()
    (tmp_path / "elsewhere").mkdir()
    for name in ("net.pt", "arch.py"):
        (tmp_path / "elsewhere" / name).write_bytes((tmp_path / name).read_bytes())
    arch = f"{tmp_path / 'elsewhere' / 'arch.py'}:net"
    path = tmp_path / "elsewhere" / "net.pt"
    report = run(path=path, read=ReadOptions(arch=arch), images=replace(file.images, source="my images"))
    (found,) = report.runs
    assert report.cached
    assert (found.model["path"], found.model["arch"], found.images["path"]) == (str(path), arch, "my images")


def test_another_question_is_not_answered_from_the_cache(run, counted, tmp_path):
    run()
    for other in ({"alpha": 0.2}, {"seed": 2}, {"labels": (1, 2)}, {"reports": False}):
        assert not run(**other).cached
    arch = tmp_path / "arch.py"
    arch.write_text(arch.read_text() + "\n# changed\n")
    assert not run().cached
    assert run().cached


def test_an_incomplete_report_is_not_kept(run, counted):
    assert not run(timeout=0.0).complete
    assert not run().cached


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"verdict": "clean"', '"verdict": "backdoored"'),
        lambda text: text.replace("backdoorscan.report/1", "backdoorscan.report/2"),
        lambda text: "[1]",
        lambda text: '{"report": 3, "digest": "", "made": ""}',
        lambda text: text.replace('"digest"', '"digger"'),
    ],
)
def test_a_damaged_report_is_not_there(run, counted, told, spoil, tmp_path):
    first = run()
    (path,) = (tmp_path / "kept" / "scans").iterdir()
    path.write_text(spoil(path.read_text()))
    counted()
    second = run()
    assert (second.cached, counted(), told) == (False, sorted(UNITS), [])
    assert plain(second) == plain(first)
    assert run().cached


def test_a_folder_that_cannot_be_written_is_one_warning(run, counted, told, tmp_path):
    (tmp_path / "file").touch()
    report = run(keeping=Keeping(tmp_path / "file" / "kept", tell=told.append))
    assert report.complete
    (warning,) = told
    assert warning.startswith("warning: nothing is kept in the cache: Cannot write ")


def test_listeners_hear_of_an_answer_from_the_cache(run, monkeypatch):
    heard = []
    monkeypatch.setattr(scanning.Registry, "announce", lambda self, event, **facts: heard.append(event))
    run()
    heard.clear()
    run()
    assert heard == ["scan_finished"]
