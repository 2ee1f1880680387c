import json
from dataclasses import replace

import pytest
import torch

from backdoorscan.errors import UsageError
from backdoorscan.findings import Finding, Severity, Verdict
from backdoorscan.report import Cost, DetectorRun, ModelRun, ScanReport
from backdoorscan.trigger import Trigger, stamp


def through_json(data):
    return json.loads(json.dumps(data, allow_nan=False))


TRIGGER = Trigger(torch.rand(1, 4, 5), torch.rand(3, 4, 5), 7)
FULL = Finding(
    target_label=7, p_value=1e-9, score=4.5, source_label=2, trigger=TRIGGER, attack_success_rate=0.97, detector="x"
)
BARE = Finding(target_label=0, p_value=1.0, score=-0.5)
JUDGED = replace(FULL, severity=Severity.HIGH, suppressed="ours")


def same(one: Finding, other: Finding) -> bool:
    tensors = [(f.trigger.mask, f.trigger.pattern) for f in (one, other) if f.trigger]
    exact = all(torch.equal(a, b) for a, b in zip(*tensors, strict=True)) if len(tensors) == 2 else not tensors
    targets = [f.trigger and f.trigger.target for f in (one, other)]
    return exact and targets[0] == targets[1] and replace(one, trigger=None) == replace(other, trigger=None)


@pytest.mark.parametrize("finding", [FULL, BARE, JUDGED], ids=["full", "bare", "judged"])
def test_a_finding_survives_json(finding):
    assert same(Finding.from_json(through_json(finding.to_json())), finding)


def test_a_fingerprint_is_of_the_bytes_the_method_and_the_labels():
    same = [FULL, replace(FULL, p_value=0.5, score=0.0, trigger=None, suppressed="x")]
    others = [replace(FULL, detector="y"), replace(FULL, target_label=8), replace(FULL, source_label=None)]
    assert len({finding.fingerprint("a" * 64) for finding in same}) == 1
    assert len({finding.fingerprint("a" * 64) for finding in (FULL, *others)} | {FULL.fingerprint("b" * 64)}) == 5


def test_severities_are_in_order():
    assert [severity.rank for severity in Severity] == [0, 1, 2, 3]


def test_a_finding_tells_the_size_of_its_trigger():
    trigger = FULL.to_json()["trigger"]
    assert trigger["l1"] == pytest.approx(float(TRIGGER.mask.sum()))
    assert trigger["area"] == pytest.approx(float(TRIGGER.mask.mean()))


def test_a_reversed_trigger_of_a_read_finding_can_be_used():
    read = Finding.from_json(through_json(FULL.to_json()))
    assert torch.equal(read.trigger.stamp(torch.zeros(2, 3, 4, 5)), TRIGGER.stamp(torch.zeros(2, 3, 4, 5)))


def report() -> ScanReport:
    detector = DetectorRun(
        id="x", version="1", options={"steps": 3, "drop": [1.0]}, evidence={"units": [{"a": 1}]}, p_value=0.5, note="n"
    )
    run = ModelRun(
        model={"path": "m.h5", "num_classes": 8},
        images={"path": "v.h5", "count": 3},
        verdict=Verdict.BACKDOORED,
        complete=False,
        clean_accuracy=0.5,
        findings=[FULL, BARE],
        detectors=[detector, replace(detector, id="y", error="failed", p_value=None)],
        cost=Cost(5, 1.0, 2.0, 3.0),
        not_tested=["all-to-all backdoors"],
    )
    bare = replace(run, images=None, verdict=Verdict.CLEAN, clean_accuracy=None, findings=[], detectors=[])
    return ScanReport(
        seed=4,
        versions={"torch": "2"},
        cost=Cost(5),
        verdict=Verdict.BACKDOORED,
        complete=False,
        alpha=0.01,
        runs=[run, bare],
    )


def test_a_scan_report_survives_json():
    before = report()
    after = ScanReport.from_json(through_json(before.to_json()))
    for one, other in zip(before.runs, after.runs, strict=True):
        assert len(one.findings) == len(other.findings)
        assert all(map(same, one.findings, other.findings))
        assert isinstance(other.verdict, Verdict)
        assert [run.options for run in one.detectors] == [run.options for run in other.detectors]
    assert replace(before, runs=[]) == replace(after, runs=[])
    assert isinstance(after.verdict, Verdict)
    assert after.to_json() == before.to_json()


@pytest.mark.parametrize(
    "data", [{}, [], None, {"schema": "backdoorscan.report/0"}, {"schema": "backdoorscan.repair/1"}]
)
def test_anything_else_is_no_scan_report(data):
    with pytest.raises(UsageError, match="not a scan report"):
        ScanReport.from_json(data)


def test_stamp_blends():
    mask, pattern = torch.tensor([[[0.0, 0.25, 1.0]]]), torch.tensor([[[1.0, 1.0, 0.2]]])
    stamped = stamp(torch.full((2, 1, 1, 3), 0.6), mask, pattern)
    torch.testing.assert_close(stamped[1, 0, 0], torch.tensor([0.6, 0.7, 0.2]))


def test_size_of_a_trigger():
    trigger = Trigger(torch.tensor([[[0.0, 0.5], [1.0, 0.0]]]), torch.zeros(3, 2, 2), 0)
    assert (trigger.l1, trigger.area) == (1.5, 0.375)
