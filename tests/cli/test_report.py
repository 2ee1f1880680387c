"""``backdoorscan report``: a stored report in other formats, and judged again, without a scan."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]


@pytest.fixture
def stored(scanned: Any, elsewhere: Path) -> Path:
    """The scan of the demo's backdoored network, as a file."""
    path = elsewhere / "scan.json"
    path.write_text(scanned.out)
    return path


@pytest.fixture
def change(scanned: Any, elsewhere: Path) -> Callable[..., Path]:
    """``change(lambda report: ...)``: the same with something else in it."""

    def changed(edit: Callable[[Any], object]) -> Path:
        report = scanned.json
        edit(report)
        path = elsewhere / "changed.json"
        path.write_text(json.dumps(report))
        return path

    return changed


def test_the_same_json_again(stored: Path, scanned: Any, cli: Cli) -> None:
    result = cli("report", stored, "-f", "json")
    assert result.code == ExitCode.FOUND
    assert result.json == scanned.json
    assert result.err == ""


@pytest.mark.parametrize("format", ["table", "html", "markdown", "sarif", "junit", "cyclonedx"])
def test_every_format_alone_on_stdout(format: str, stored: Path, cli: Cli) -> None:
    result = cli("report", stored, "-f", format)
    assert (result.code, result.err) == (ExitCode.FOUND, "")
    if format in ("sarif", "cyclonedx"):
        assert result.json["version"]
    if format == "junit":
        assert ET.fromstring(result.out).get("failures") == "1"


def test_several_formats_at_once(stored: Path, cli: Cli, elsewhere: Path) -> None:
    files = ("-f", "sarif=a.sarif", "-f", "html=a.html", "-f", "junit=a.xml")
    result = cli("report", stored, *files)
    assert "BACKDOORED" in result.out
    assert result.err.splitlines() == ["wrote a.sarif", "wrote a.html", "wrote a.xml"]
    assert json.loads((elsewhere / "a.sarif").read_text())["version"] == "2.1.0"
    assert cli("-q", "report", stored, *files).out == ""
    assert cli("report", stored, *files, "-f", "json").json["verdict"] == "backdoored"
    assert cli("report", stored, "-f", "json", "-o", "b.json").out == ""
    assert (elsewhere / "b.json").exists()
    assert cli("report", stored, "-f", "json=-").json["verdict"] == "backdoored"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-f sarif -f json", "The formats sarif and json both go to stdout"),
        ("-f sarif=a -f json=./a", "Two formats go to"),
        ("-f sarif -f json -o a", "goes with one format"),
        ("-f sarif=a -o b", "goes with one format"),
        ("-f sarif=", "names no file"),
        ("-f sarf=a", "Did you mean 'sarif'"),
        ("-f json=no/such/folder.json", "there is no folder"),
        ("-f json=.", "is a folder"),
        ("--alpha 2", "not between 0 and 1"),
        ("--fail-on hgih", "Did you mean 'high'"),
        ("--baseline missing.toml", "Cannot read the baseline"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    arguments: str, message: str, stored: Path, cli: Cli, elsewhere: Path
) -> None:
    result = cli("report", stored, *arguments.split())
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert message in result.err
    assert [path.name for path in elsewhere.iterdir()] == ["scan.json"]


def test_one_that_cannot_be_written_keeps_no_other_from_it(
    stored: Path, cli: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backdoorscan.files import write_whole

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("bad"):
            from backdoorscan.errors import OutputError

            raise OutputError(f"Cannot write {path}.", why="No space left on device")
        write_whole(path, data)

    monkeypatch.setattr("backdoorscan.cli._console.write_whole", full)
    result = cli("report", stored, "-f", "sarif=bad.sarif", "-f", "junit=good.xml", "-f", "json")
    assert result.code == ExitCode.ERROR
    assert "Cannot write bad.sarif" in result.err
    assert result.json["verdict"] == "backdoored"
    assert (elsewhere / "good.xml").exists()
    result = cli("report", stored, "-f", "sarif=bad.sarif", "-f", "junit=bad.xml")
    assert "2 reports were not written" in result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "Cannot read the report"),
        (b"{", "Cannot read the report"),
        (b"[" * 100_000, "Cannot read the report"),
        (b"[]", 'It has no "schema"'),
        (b'{"schema": "backdoorscan.bench/1"}', "backdoorscan.bench/1"),
        (b'{"schema": "backdoorscan.report/1"}', "does not fit the schema"),
    ],
)
def test_what_is_no_report(content: bytes, message: str, cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "x.json").write_bytes(content)
    result = cli("report", "x.json")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert message in result.err
    assert "Internal error" not in result.err


def test_no_file(cli: Cli) -> None:
    result = cli("report", "missing.json")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()


@pytest.mark.parametrize(
    "edit",
    [
        lambda report: report.update(alpha="0.01"),
        lambda report: report.update(surprise=1),
        lambda report: report["runs"][0]["findings"][0].update(p_value=2),
        lambda report: report["runs"][0]["model"].update(sha256="x"),
        lambda report: report["runs"][0]["findings"][0]["trigger"]["mask"].update(float32="AAAA"),
        lambda report: report["runs"][0]["findings"][0]["trigger"]["mask"].update(shape=[1, 999, 999]),
    ],
)
def test_damaged_reports(edit: Callable[[Any], object], change: Callable[..., Path], cli: Cli) -> None:
    result = cli("report", change(edit))
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "Internal error" not in result.err


def test_judged_again(change: Callable[..., Path], cli: Cli) -> None:
    def verdict(p_value: float, *arguments: object) -> tuple[int, str]:
        def edit(report: Any) -> None:
            report["runs"][0]["findings"][0]["p_value"] = p_value
            report["runs"][0]["otherwise"] = "clean"

        result = cli("report", change(edit), "-f", "json", *arguments)
        return result.code, result.json["runs"][0]["verdict"]

    assert verdict(0.004) == (ExitCode.FOUND, "backdoored")
    assert verdict(0.004, "--alpha", 0.004) == (ExitCode.FOUND, "backdoored")
    assert verdict(0.004, "--alpha", 0.05) == (ExitCode.FOUND, "backdoored")
    assert verdict(0.004, "--alpha", 0.002) == (ExitCode.INCONCLUSIVE, "inconclusive")
    assert verdict(0.004, "--alpha", 0.001) == (ExitCode.OK, "clean")
    assert verdict(0.004, "--fail-on", "never") == (ExitCode.OK, "backdoored")


def test_judged_again_beyond_what_the_report_keeps(change: Callable[..., Path], cli: Cli) -> None:
    def clean(p_value: float) -> Path:
        def edit(report: Any) -> None:
            report.update(verdict="clean")
            report["runs"][0].update(verdict="clean", findings=[], otherwise="clean")
            report["runs"][0]["detectors"][0].update(p_value=p_value)

        return change(edit)

    result = cli("report", clean(0.1), "--alpha", 0.05)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "cannot tell for --alpha 0.05" in result.err
    assert cli("report", clean(0.2), "--alpha", 0.05).code == ExitCode.OK
    assert cli("report", clean(0.1), "--alpha", 0.001).code == ExitCode.OK


def test_an_incomplete_scan_never_passes(change: Callable[..., Path], cli: Cli) -> None:
    def edit(report: Any) -> None:
        report.update(verdict="inconclusive", complete=False)
        report["runs"][0].update(verdict="inconclusive", complete=False, findings=[], otherwise="inconclusive")

    assert cli("report", change(edit), "--fail-on", "never").code == ExitCode.ERROR


def test_a_baseline_accepts(stored: Path, cli: Cli, elsewhere: Path, scanned: Any) -> None:
    from backdoorscan.report import ScanReport

    (run,) = ScanReport.from_json(scanned.json).runs
    entry = f'[[finding]]\nfingerprint = "{run.findings[0].fingerprint(run.model["sha256"])}"\nreason = "ours"\n'
    (elsewhere / "accepted.toml").write_text(entry + "expires = 9999-01-01\n")
    result = cli("report", stored, "--baseline", "accepted.toml", "-f", "sarif")
    assert result.code != ExitCode.FOUND
    (found,) = result.json["runs"][0]["results"]
    assert found["suppressions"][0]["justification"] == "ours"
    (elsewhere / "accepted.toml").write_text(entry + "expires = 2001-01-01\n")
    result = cli("report", stored, "--baseline", "accepted.toml")
    assert result.code == ExitCode.FOUND
    assert "expired" in result.err


def test_repairs_and_evaluations(repaired: Any, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "repair.json").write_text(repaired.out)
    result = cli("report", "repair.json", "-f", "json")
    assert (result.code, result.json) == (repaired.code, repaired.json)
    for format in ("table", "html", "markdown", "sarif", "junit", "cyclonedx"):
        assert cli("report", "repair.json", "-f", format).code == repaired.code
    result = cli("report", "repair.json", "--alpha", 0.01)
    assert result.code == ExitCode.ERROR
    assert "is no scan" in result.err

    measured = cli("evaluate", demo.model, "--valid", demo.clean, "-f", "json")
    (elsewhere / "evaluation.json").write_text(measured.out)
    result = cli("report", "evaluation.json", "-f", "json")
    assert (result.code, result.json) == (ExitCode.OK, measured.json)
    assert "Evaluation" in cli("report", "evaluation.json", "-f", "markdown").out


@pytest.mark.parametrize("format", ["sarif", "junit"])
def test_evaluations_hold_no_verdict(
    format: str, cli: Cli, demo: DemoFiles, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    monkeypatch.setattr("backdoorscan.formats.images.load_images", None)  # who works fails
    result = cli("evaluate", demo.model, "--valid", demo.clean, "-f", f"{format}=x")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "Formats that do: table, json, html, markdown, cyclonedx." in result.err
