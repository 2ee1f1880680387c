"""Findings that somebody accepts."""

import datetime
import tomllib
from dataclasses import replace

import pytest

from backdoorscan import baseline
from backdoorscan.errors import OutputError, UnknownNameError, UsageError
from backdoorscan.findings import Finding, Severity, Verdict
from backdoorscan.report import Cost, ModelRun, ScanReport

TODAY = datetime.date(2026, 11, 21)
DAY = datetime.timedelta(days=1)


def finding(target: int, **changes) -> Finding:
    facts = {"detector": "confirmation", "p_value": 0.001, "score": 2.0, "severity": Severity.HIGH}
    return Finding(target_label=target, **{**facts, **changes})


def run_of(*findings: Finding, path="m.h5", sha256="a" * 64) -> ModelRun:
    return ModelRun(
        model={"path": path, "sha256": sha256},
        images=None,
        verdict=Verdict.BACKDOORED,
        complete=True,
        clean_accuracy=None,
        findings=findings,
        detectors=[],
        cost=Cost(),
    )


def report_of(*runs: ModelRun) -> ScanReport:
    return ScanReport(0, {}, Cost(), Verdict.BACKDOORED, True, 0.01, runs)


REPORT = report_of(run_of(finding(7), finding(3, source_label=1)), run_of(finding(7), path="n.h5", sha256="b" * 64))


@pytest.fixture
def written(tmp_path):
    """A baseline of ``REPORT`` with reasons in the first ``count`` entries."""

    def write(count: int):
        path = tmp_path / "baseline.toml"
        baseline.write(path, REPORT, TODAY)
        path.write_text(path.read_text().replace('reason = ""', 'reason = "ours"', count))
        return path

    return write


def suppressed(report: ScanReport) -> list[list[str | None]]:
    return [[f.suppressed for f in run.findings] for run in report.runs]


def test_what_is_written_can_be_read_and_needs_reasons(tmp_path, written):
    path = written(0)
    entries = tomllib.loads(path.read_text())["finding"]
    assert [(e["model"], e["detector"], e["target_label"], e.get("source_label")) for e in entries] == [
        ("m.h5", "confirmation", 7, None),
        ("m.h5", "confirmation", 3, 1),
        ("n.h5", "confirmation", 7, None),
    ]
    assert {e["reason"] for e in entries} == {""}
    assert {e["expires"] for e in entries} == {TODAY + baseline.DAYS * DAY}
    with pytest.raises(UsageError, match=r"m\.h5, confirmation, label 7\) has no reason"):
        baseline.load(path)
    with pytest.raises(UsageError, match=r"n\.h5, confirmation, label 7\) has no reason"):
        baseline.load(written(2))
    assert len(baseline.load(written(3))) == 3


def test_exactly_the_named_findings_are_accepted(written):
    entries = baseline.load(written(3))
    report, expired = baseline.suppress(REPORT, entries, TODAY)
    assert suppressed(report) == [["ours", "ours"], ["ours"]]
    assert expired == []
    others = report_of(
        run_of(
            finding(8),
            finding(7, detector="warp"),
            finding(3),
            finding(3, source_label=2),
            finding(7, p_value=0.009, score=9.0),
        ),
        run_of(finding(7), sha256="c" * 64),
    )
    report, _ = baseline.suppress(others, entries, TODAY)
    assert suppressed(report) == [[None, None, None, None, "ours"], [None]]


def test_verdicts_and_findings_stay(written):
    report, _ = baseline.suppress(REPORT, baseline.load(written(3)), TODAY)
    stripped = [replace(f, suppressed=None) for run in report.runs for f in run.findings]
    assert stripped == [f for run in REPORT.runs for f in run.findings]
    assert [report.verdict, *(run.verdict for run in report.runs)] == [Verdict.BACKDOORED] * 3


@pytest.mark.parametrize(("after", "accepts"), [(0, True), (baseline.DAYS, True), (baseline.DAYS + 1, False)])
def test_an_entry_counts_to_the_end_of_its_last_day(written, after, accepts):
    entries = baseline.load(written(3))
    report, expired = baseline.suppress(REPORT, entries, TODAY + after * DAY)
    assert suppressed(report) == ([["ours", "ours"], ["ours"]] if accepts else [[None, None], [None]])
    assert expired == ([] if accepts else entries)


def test_an_expired_entry_of_something_else_is_not_told(written):
    entries = baseline.load(written(3))
    _, expired = baseline.suppress(report_of(REPORT.runs[1]), entries, TODAY + 400 * DAY)
    assert [entry.model for entry in expired] == ["n.h5"]


def test_writing_again_keeps_what_is_there(written):
    path = written(1)
    more = report_of(run_of(finding(7), finding(9)))
    assert baseline.write(path, more, TODAY + DAY) == 1
    entries = baseline.load(path, whole=False)
    assert [(e.target_label, e.reason) for e in entries] == [(7, "ours"), (3, ""), (7, ""), (9, "")]
    assert [(e.expires - TODAY).days for e in entries] == [90, 90, 90, 91]
    before = path.read_bytes()
    assert baseline.write(path, more, TODAY + 2 * DAY) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ['a"b\\', "a\nb", "\x7f\x1b[2J", "ü\u202e", "\udcff"])
def test_names_that_are_hostile(tmp_path, name):
    path = tmp_path / "b.toml"
    baseline.write(path, report_of(run_of(finding(1), path=name)), TODAY)
    (entry,) = baseline.load(path, whole=False)
    assert entry.model.isprintable()


ENTRY = '[[finding]]\nfingerprint = "abc"\nreason = "x"\nexpires = 2027-01-31\n'


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (ENTRY.replace('"x"', '"  "'), UsageError, "finding abc has no reason"),
        (ENTRY.replace('reason = "x"\n', ""), UsageError, "has no reason"),
        (ENTRY.replace("expires = 2027-01-31\n", ""), UsageError, "abc does not expire"),
        (ENTRY.replace("2027-01-31", '"2027-01-31"'), UsageError, "expires = '2027-01-31' is not a date"),
        (ENTRY.replace("2027-01-31", "2027-01-31T10:00:00"), UsageError, "is not a date"),
        (ENTRY.replace('fingerprint = "abc"', ""), UsageError, "finding 1 has no fingerprint"),
        (ENTRY.replace("reason", "raeson"), UnknownNameError, "Did you mean 'reason'"),
        (ENTRY.replace("[[finding]]", "[[findings]]"), UnknownNameError, "Did you mean 'finding'"),
        ("finding = 3", UsageError, "is not a list of tables"),
        ("finding = [3]", UsageError, "is not a list of tables"),
        ("[[finding", UsageError, "Cannot read the baseline"),
    ],
)
def test_files_that_are_none(tmp_path, text, error, says):
    path = tmp_path / "b.toml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        baseline.load(path)
    assert says in str(caught.value)


def test_an_empty_file_accepts_nothing(tmp_path):
    (tmp_path / "b.toml").touch()
    assert baseline.load(tmp_path / "b.toml") == []
    with pytest.raises(UsageError, match=r"none\.toml"):
        baseline.load(tmp_path / "none.toml")


def test_a_disk_that_refuses(tmp_path):
    with pytest.raises(OutputError, match="Cannot write"):
        baseline.write(tmp_path / "none" / "b.toml", REPORT, TODAY)
