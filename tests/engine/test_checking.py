"""Nonsense that a detector returns is a failure of the detector, never a verdict."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from backdoorscan import policy, scan
from backdoorscan.errors import ExitCode
from backdoorscan.findings import Evidence, Finding, Judgement, Unit, Verdict
from backdoorscan.plugin.detector import Detector
from backdoorscan.scanning import ScanOptions
from backdoorscan.trigger import Trigger

NAN = float("nan")
SIZE = 12
FINDING = Finding(target_label=1, p_value=0.5, score=1.0)
SOUND = Trigger(torch.full((1, SIZE, SIZE), 0.5), torch.ones(1, SIZE, SIZE), 1)


@dataclass(frozen=True, kw_only=True)
class Answering(Detector):
    """Returns what it is told to."""

    id = "answering"
    answers: ClassVar[dict[str, Any]] = {}

    def units(self, classifier, context):
        return self.answers.get("units", [Unit("one")])

    def examine(self, unit, classifier, images, context):
        return self.answers.get("evidence", Evidence(figures={}))

    def judge(self, evidence):
        return self.answers.get("judgement", Judgement(findings=[FINDING], p_value=0.5, ranking=[1, 0], note="so"))


@dataclass(frozen=True, kw_only=True)
class Certain(Detector):
    """Finds a backdoor, or none."""

    id = "certain"
    p_value: ClassVar[float] = 1.0

    def examine(self, unit, classifier, images, context):
        return Evidence(figures={})

    def judge(self, evidence):
        return Judgement(findings=[replace(FINDING, p_value=self.p_value)], p_value=self.p_value)


@pytest.fixture
def answered(model_file, registry_of):
    """``answered(certain, units=..., evidence=..., judgement=...)``: the report on a clean file."""

    def run(certain, **answers):
        file = model_file(None)
        # Options of a method are plain data: what these return is given to the classes.
        one = type("One", (Answering,), {"answers": answers})
        other = type("Other", (Certain,), {"p_value": certain})
        return scan(file.path, file.images, file.read, registry=registry_of(detectors=[one, other]))

    return run


def of(**changes: Any) -> dict[str, Any]:
    """A judgement of one finding with something else about it."""
    return {"judgement": Judgement(findings=[replace(FINDING, **changes)], p_value=changes.get("p_value", 0.5))}


def judged(**facts: Any) -> dict[str, Any]:
    return {"judgement": Judgement(**{"p_value": 0.5, **facts})}


def with_trigger(**changes: Any) -> dict[str, Any]:
    return {"evidence": Evidence(figures={}, triggers=[replace(SOUND, **changes)])}


NONSENSE = {
    "no units": {"units": None},
    "a unit that is none": {"units": ["one"]},
    "two units of one name": {"units": [Unit("one"), Unit("one", (1,))]},
    "no evidence": {"evidence": None},
    "figures without names": {"evidence": Evidence(figures=[1])},
    "figures that are no data": {"evidence": Evidence(figures={"network": object()})},
    "a cost below nothing": {"evidence": Evidence(figures={}, gradient_samples=-1)},
    "a cost in words": {"evidence": Evidence(figures={}, gradient_samples="many")},
    "a trigger that is none": {"evidence": Evidence(figures={}, triggers=["square"])},
    "a mask of another size": with_trigger(mask=torch.zeros(1, 3, 3)),
    "a mask that is no tensor": with_trigger(mask=[0.0]),
    "a mask of no number": with_trigger(mask=torch.full((1, SIZE, SIZE), NAN)),
    "a pattern too bright": with_trigger(pattern=torch.full((1, SIZE, SIZE), 2.0)),
    "a trigger of a label that there is not": with_trigger(target=99),
    "no judgement": {"judgement": None},
    "a judgement in words": {"judgement": "clean"},
    "a p-value of no number": judged(p_value=NAN),
    "a p-value in words": judged(p_value="0.5"),
    "a p-value that is a tensor": judged(p_value=torch.tensor(0.5)),
    "a p-value below 0": judged(p_value=-0.1),
    "a p-value above 1": judged(p_value=1.5),
    "a p-value that is a truth": judged(p_value=True),
    "strong evidence of no label": judged(p_value=0.0001),
    "a finding but no p-value": judged(findings=[FINDING], p_value=None),
    "a p-value that its finding contradicts": judged(findings=[FINDING], p_value=0.9),
    "a finding that is none": judged(findings=[1]),
    "a finding's p-value of no number": of(p_value=NAN),
    "a finding's p-value above 1": of(p_value=7.0),
    "a label that there is not": of(target_label=99),
    "a label in words": of(target_label="cat"),
    "a source that there is not": of(source_label=-1),
    "a score in words": of(score="high"),
    "a success above 1": of(attack_success_rate=60.0),
    "a finding's trigger of another size": of(trigger=replace(SOUND, mask=torch.zeros(3))),
    "a rank of a label that there is not": judged(ranking=[99]),
    "a judgement's figures that are no data": judged(figures={"when": {1, 2}}),
    "a note that is no text": judged(note=["so"]),
}


@pytest.mark.parametrize("answers", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_a_failure_of_its_detector(answered, answers):
    report = answered(1.0, **answers)
    assert (report.verdict, report.complete) == (Verdict.INCONCLUSIVE, False)
    errors = {run.id: run.error for run in report.runs[0].detectors}
    assert errors["answering"].startswith("answering returned ")
    assert errors["certain"] == ""
    assert policy.exit_code(report.verdict, report.complete) is ExitCode.ERROR


def test_it_hides_nothing_that_another_detector_finds(answered):
    report = answered(0.0001, judgement=Judgement(p_value=NAN))
    assert (report.verdict, report.complete) == (Verdict.BACKDOORED, False)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"units": ()},
        {"evidence": Evidence(figures={"loss": NAN}, triggers=[SOUND, replace(SOUND, target=-1)])},
        {"judgement": Judgement(p_value=None, note="nothing to compare")},
        of(p_value=1, score=float("inf"), source_label=0, attack_success_rate=1, trigger=SOUND),
    ],
)
def test_what_is_sound_passes(answered, answers):
    report = answered(1.0, **answers)
    assert (report.verdict, report.complete) == (Verdict.CLEAN, True)


def test_a_detector_that_ends_the_program_only_fails(model_file, registry_of):
    @dataclass(frozen=True, kw_only=True)
    class Ending(Certain):
        """Wants to choose the exit code."""

        id = "ending"

        def examine(self, unit, classifier, images, context):
            raise SystemExit(0)

    file = model_file(None)
    for jobs in (1, 2):
        registry = registry_of(detectors=[Ending, Certain])
        report = scan(file.path, file.images, file.read, ScanOptions(jobs=jobs), registry=registry)
        assert (report.verdict, report.complete) == (Verdict.INCONCLUSIVE, False)
        assert "SystemExit: 0" in report.runs[0].detectors[1].error
