from dataclasses import replace

import pytest

from backdoorscan import policy
from backdoorscan.errors import ExitCode, UnknownNameError
from backdoorscan.findings import Finding, Judgement, Severity, Verdict
from backdoorscan.measured import CandidateRow, RepairReport, Scores
from backdoorscan.report import Cost, ModelRun


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


def test_a_detector_with_a_small_share_of_the_budget_leaves_more_to_the_others():
    ordinary, special = judged(0.004), replace(judged(0.004), share=0.25)
    _, findings = policy.verdict([ordinary, special], 0.9)
    assert [finding.p_value for finding in findings] == pytest.approx([0.005, 0.02])
    unheard = replace(judged(), p_value=None, share=10.0)
    assert policy.verdict([ordinary, unheard], 0.9)[1][0].p_value == pytest.approx(0.004)


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


@pytest.mark.parametrize(
    ("p_value", "success", "expected"),
    [
        (0.02, 1.0, "low"),
        (0.0100001, None, "low"),
        (0.01, None, "medium"),
        (0.01, 0.49, "medium"),
        (0.01, 0.5, "high"),
        (0.0011, 1.0, "high"),
        (0.001, None, "high"),
        (0.001, 0.89, "high"),
        (0.001, 0.9, "critical"),
        (0.0, 1.0, "critical"),
    ],
)
def test_severity(p_value, success, expected):
    finding = Finding(target_label=0, p_value=p_value, score=1.0, attack_success_rate=success)
    assert policy.severity(finding, 0.01) == expected


def test_severity_goes_with_alpha():
    finding = Finding(target_label=0, p_value=0.02, score=1.0, attack_success_rate=0.95)
    assert [policy.severity(finding, alpha) for alpha in (0.01, 0.02, 0.2)] == ["low", "high", "critical"]


def test_findings_of_a_verdict_have_their_severity_after_the_correction():
    _, findings = policy.verdict([judged(0.001, 0.004), judged()], 0.01)
    assert [(f.p_value, f.severity) for f in findings] == [(0.002, Severity.MEDIUM), (0.008, Severity.MEDIUM)]
    assert [f.severity for f in policy.verdict([judged(0.02)], 0.01)[1]] == [Severity.LOW]


@pytest.mark.parametrize(
    ("judgements", "expected"),
    [
        ([judged(0.001)], "clean"),
        ([judged(0.02)], "clean"),
        ([judged(0.001, 0.02)], "inconclusive"),
        ([judged(0.001), NO_ANSWER], "clean"),
        ([judged(1.0)], "clean"),
        ([NO_ANSWER], "inconclusive"),
    ],
)
def test_the_verdict_but_for_the_findings(judgements, expected):
    _, findings = policy.verdict(judgements, 0.01)
    assert policy.otherwise(judgements, findings, 0.01) == expected


def test_fail_on():
    severities = list(Severity)
    fails = {word: [policy.FailOn(word).fails(s) for s in severities].count(True) for word in policy.FailOn}
    assert fails == {"low": 4, "medium": 3, "high": 2, "critical": 1, "never": 0}
    assert policy.FailOn.named("high") is policy.FailOn.HIGH
    with pytest.raises(UnknownNameError, match="Did you mean 'medium'"):
        policy.FailOn.named("medum")


def run_of(verdict: str, *severities: str, complete=True, suppressed=(), otherwise="clean") -> ModelRun:
    findings = [
        Finding(
            target_label=label,
            p_value=0.0,
            score=1.0,
            severity=Severity(word),
            suppressed="known" if label in suppressed else None,
        )
        for label, word in enumerate(severities)
    ]
    return ModelRun(
        model={},
        images=None,
        verdict=Verdict(verdict),
        complete=complete,
        clean_accuracy=None,
        findings=findings,
        detectors=[],
        cost=Cost(),
        otherwise=Verdict(otherwise),
    )


LEVELS = ["low", "medium", "high", "critical", "never"]


@pytest.mark.parametrize(
    ("run", "codes"),
    [
        (run_of("clean"), [0, 0, 0, 0, 0]),
        (run_of("clean", complete=False), [2, 2, 2, 2, 2]),
        (run_of("inconclusive"), [3, 3, 3, 3, 3]),
        (run_of("inconclusive", complete=False), [2, 2, 2, 2, 2]),
        (run_of("inconclusive", "low"), [1, 3, 0, 0, 0]),
        (run_of("inconclusive", "low", complete=False), [1, 2, 2, 2, 2]),
        (run_of("backdoored", "medium"), [1, 1, 0, 0, 0]),
        (run_of("backdoored", "medium", "high"), [1, 1, 1, 0, 0]),
        (run_of("backdoored", "critical"), [1, 1, 1, 1, 0]),
        (run_of("backdoored", "critical", complete=False), [1, 1, 1, 1, 2]),
        (run_of("backdoored", "critical", suppressed=[0]), [0, 0, 0, 0, 0]),
        (run_of("backdoored", "critical", suppressed=[0], complete=False), [2, 2, 2, 2, 2]),
        (run_of("backdoored", "critical", suppressed=[0], otherwise="inconclusive"), [3, 3, 3, 3, 3]),
        (run_of("backdoored", "critical", "high", suppressed=[0]), [1, 1, 1, 0, 0]),
        (run_of("inconclusive", "low", suppressed=[0]), [0, 0, 0, 0, 0]),
    ],
)
def test_gate(run, codes):
    assert [policy.gate([(run, policy.FailOn(level))]) for level in LEVELS] == codes


@pytest.mark.parametrize("verdict", ["clean", "inconclusive", "backdoored"])
@pytest.mark.parametrize("complete", [True, False])
def test_the_default_gate_says_what_the_verdict_says(verdict, complete):
    severities = {"clean": [], "inconclusive": ["low"], "backdoored": ["medium", "critical"]}[verdict]
    run = run_of(verdict, *severities, complete=complete)
    assert policy.gate([(run, policy.DEFAULT_FAIL_ON)]) is policy.exit_code(run.verdict, complete)


def test_of_several_models_the_worst_counts():
    clean, error = run_of("clean"), run_of("inconclusive", complete=False)
    unsure, bad = run_of("inconclusive"), run_of("backdoored", "high")

    def gate(*runs, fail_on="medium"):
        return policy.gate([(run, policy.FailOn(fail_on)) for run in runs])

    assert [gate(clean), gate(clean, unsure), gate(unsure, error, clean), gate(error, clean, bad)] == [0, 3, 2, 1]
    assert policy.gate([(bad, policy.FailOn.CRITICAL), (clean, policy.FailOn.LOW)]) is ExitCode.OK


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
