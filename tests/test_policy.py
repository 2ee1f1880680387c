from dataclasses import replace

import pytest

from backdoorscan import policy
from backdoorscan.errors import ExitCode
from backdoorscan.findings import Finding, Judgement, Verdict
from backdoorscan.measured import CandidateRow, RepairReport, Scores
from backdoorscan.report import Cost


def judged(*p_values, p_value=1.0) -> Judgement:
    findings = [Finding(target_label=label, p_value=p, score=1.0) for label, p in enumerate(p_values)]
    return Judgement(findings=findings, p_value=min(p_values, default=p_value))


NO_ANSWER = Judgement(p_value=None)


@pytest.mark.parametrize(
    ("judgements", "expected", "labels"),
    [
        ([judged(0.0001)], "backdoored", [0]),
        ([judged(0.01)], "backdoored", [0]),
        ([judged(0.0100001)], "inconclusive", [0]),
        ([judged(0.03)], "inconclusive", [0]),
        ([judged(0.0301)], "clean", []),
        ([judged(1.0)], "clean", []),
        ([judged()], "clean", []),
        ([judged(0.02, 0.001, 0.5)], "backdoored", [1]),
        ([judged(0.02, 0.015, 0.5)], "inconclusive", [1, 0]),
        ([judged(1.0), judged(1.0, 0.001)], "backdoored", [1]),
        ([NO_ANSWER], "inconclusive", []),
        ([], "inconclusive", []),
        ([NO_ANSWER, judged(1.0)], "clean", []),
        ([NO_ANSWER, judged(0.001)], "backdoored", [0]),
    ],
)
def test_verdict(judgements, expected, labels):
    verdict, findings = policy.verdict(judgements, 0.01)
    assert verdict == expected
    assert [finding.target_label for finding in findings] == labels


@pytest.mark.parametrize(
    ("judgements", "expected", "p_values"),
    [
        ([judged(0.006)], "backdoored", [0.006]),
        ([judged(0.006), judged(1.0)], "inconclusive", [0.012]),
        ([judged(0.006), NO_ANSWER, NO_ANSWER], "backdoored", [0.006]),
        ([judged(0.004), judged(1.0)], "backdoored", [0.008]),
        ([judged(0.004), judged(1.0), judged(0.6)], "inconclusive", [0.012]),
        ([judged(0.011), judged(1.0), judged(1.0)], "clean", []),
        ([judged(0.001, 0.002), judged(0.0015), judged()], "backdoored", [0.003, 0.0045, 0.006]),
    ],
)
def test_p_values_are_corrected_for_the_detectors_that_answered(judgements, expected, p_values):
    verdict, findings = policy.verdict(judgements, 0.01)
    assert verdict == expected
    assert [finding.p_value for finding in findings] == pytest.approx(p_values)


def test_a_corrected_p_value_is_a_probability():
    verdict, findings = policy.verdict([judged(0.4), judged(0.5)], 0.99)
    assert verdict is Verdict.BACKDOORED
    assert [finding.p_value for finding in findings] == pytest.approx([0.8])
    assert policy.verdict([judged(0.4), judged(0.4), judged(0.4)], 0.5)[1][0].p_value == 1


def test_a_large_alpha_has_no_room_for_suspicion():
    assert policy.verdict([judged(1.0)], 0.5)[0] is Verdict.INCONCLUSIVE
    assert policy.verdict([judged(0.5)], 0.5)[0] is Verdict.BACKDOORED


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("clean clean", "clean"),
        ("clean inconclusive", "inconclusive"),
        ("inconclusive backdoored clean", "backdoored"),
    ],
)
def test_worst(verdicts, expected):
    assert policy.worst([Verdict(word) for word in verdicts.split()]) == expected


@pytest.mark.parametrize(
    ("verdict", "complete", "code"),
    [
        ("clean", True, ExitCode.OK),
        ("clean", False, ExitCode.ERROR),
        ("backdoored", True, ExitCode.FOUND),
        ("backdoored", False, ExitCode.FOUND),
        ("inconclusive", True, ExitCode.INCONCLUSIVE),
        ("inconclusive", False, ExitCode.ERROR),
    ],
)
def test_exit_code(verdict, complete, code):
    assert policy.exit_code(Verdict(verdict), complete) is code


REPORT = RepairReport(
    seed=0,
    versions={},
    cost=Cost(),
    model={},
    images={},
    poisoned=None,
    method="prune",
    options={},
    before=Scores(1.0, 1.0, macro_precision=1.0),
    candidates=[],
)


@pytest.mark.parametrize(
    ("rates", "code"),
    [
        ([0.0], ExitCode.OK),
        ([0.10], ExitCode.OK),
        ([0.11], ExitCode.FOUND),
        ([0.9, 0.05], ExitCode.OK),
        ([0.9, 0.5], ExitCode.FOUND),
        ([None, None], ExitCode.OK),
    ],
)
def test_repair_exit_code(rates, code):
    rows = [CandidateRow("x", "repaired", Scores(0.9, rate, macro_precision=0.9), {}, []) for rate in rates]
    assert policy.repair_exit_code(replace(REPORT, candidates=rows)) is code
