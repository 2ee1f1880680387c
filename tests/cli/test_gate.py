"""When ``backdoorscan scan`` fails: ``--fail-on``, baselines, and where settings come from."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from backdoorscan.cli import scan as command
from backdoorscan.config import Settings
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]

ORACLE = """
import os
from dataclasses import dataclass
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Finding, Judgement
from backdoorscan.plugin.detector import Detector

@dataclass(frozen=True, kw_only=True)
class Oracle(Detector):
    "Says what the environment says: label:p-value,..."
    id = "oracle"

    def examine(self, unit, classifier, images, context):
        if "FAIL" in os.environ:
            raise ValueError("odd")
        return Evidence(figures={"said": os.environ["SAYS"]})

    def judge(self, evidence):
        said = [part.split(":") for part in evidence[0].figures["said"].split(",") if part]
        findings = [Finding(target_label=int(label), p_value=float(p), score=1.0) for label, p in said]
        return Judgement(findings=findings, p_value=min([f.p_value for f in findings], default=1.0))

@hookimpl
def backdoorscan_detectors():
    return [Oracle]
"""


@pytest.fixture
def scan(
    demo: DemoFiles, cli: Cli, third_party: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> Cli:
    """``scan("3:0.001", ...)``: a scan of which the one detector says so."""
    third_party(ORACLE)

    def start(says: str, *arguments: object) -> Any:
        monkeypatch.setenv("SAYS", says)
        images = [] if "--valid" in arguments else ["--valid", demo.clean]
        return cli("scan", demo.model, *images, "-d", "oracle", "--no-cache", *arguments)

    return start


@pytest.mark.parametrize(
    ("says", "codes"),
    [
        ("", {"low": 0, "never": 0}),
        ("3:0.02", {"low": 1, "medium": 3, "high": 0, "never": 0}),
        ("3:0.005", {"low": 1, "medium": 1, "high": 0, "critical": 0, "never": 0}),
        ("3:0.0005", {"medium": 1, "high": 1, "critical": 0, "never": 0}),
    ],
)
def test_fail_on(says: str, codes: dict[str, int], scan: Cli) -> None:
    assert {level: scan(says, "--fail-on", level).code for level in codes} == codes
    assert scan(says).code == codes.get("medium", 0)


@pytest.mark.parametrize("level", ["low", "medium", "high", "critical", "never"])
def test_an_incomplete_scan_never_passes(level: str, scan: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "1")
    assert scan("", "--fail-on", level).code == ExitCode.ERROR


def give_reasons(file: Path, reason: str = "ours") -> None:
    file.write_text(file.read_text().replace('reason = ""', f'reason = "{reason}"'))


def test_a_baseline_accepts_what_it_names(scan: Cli, elsewhere: Path, validate: Callable[[Any], None]) -> None:
    file = elsewhere / "accepted.toml"
    first = scan("3:0.001,5:0.002", "--write-baseline", file.name)
    assert first.code == ExitCode.FOUND
    assert "wrote 2 findings to accepted.toml; each needs a reason" in first.err
    refused = scan("3:0.001,5:0.002", "--baseline", file.name)
    assert refused.code == ExitCode.ERROR
    refused.assert_one_message()
    assert "label 3) has no reason" in refused.err
    give_reasons(file, "a watermark of ours")
    result = scan("3:0.001,5:0.002", "--baseline", file.name, "-f", "json")
    assert result.code == ExitCode.OK
    validate(result.json)
    assert result.json["verdict"] == result.json["runs"][0]["verdict"] == "backdoored"
    assert [f["suppressed"] for f in result.json["runs"][0]["findings"]] == ["a watermark of ours"] * 2
    table = scan("3:0.001", "--baseline", file.name)
    assert table.code == ExitCode.OK
    assert "label 3 (oracle) is accepted by the baseline: a watermark of ours" in table.out
    assert scan("3:0.001,6:0.002", "--baseline", file.name).code == ExitCode.FOUND
    assert scan("3:0.001,6:0.02", "--baseline", file.name).code == ExitCode.INCONCLUSIVE
    sarif = json.loads(scan("3:0.001", "--baseline", file.name, "-f", "sarif").out)
    (found,) = sarif["runs"][0]["results"]
    assert found["suppressions"][0]["justification"] == "a watermark of ours"


def test_a_baseline_that_expired(scan: Cli, elsewhere: Path) -> None:
    file = elsewhere / "accepted.toml"
    scan("3:0.001", "--write-baseline", file.name)
    give_reasons(file)
    file.write_text(re.sub(r"expires = .*", "expires = 2020-02-29", file.read_text()))
    result = scan("3:0.001", "--baseline", file.name)
    assert result.code == ExitCode.FOUND
    assert "expired on 2020-02-29: accepted.toml no longer accepts the finding" in result.err
    assert "is accepted" not in result.out
    file.write_text(re.sub(r"expires = .*", "", file.read_text()))
    refused = scan("3:0.001", "--baseline", file.name)
    refused.assert_one_message()
    assert "does not expire" in refused.err


def test_a_baseline_hides_no_failure(scan: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan("3:0.001", "--write-baseline", "accepted.toml")
    give_reasons(elsewhere / "accepted.toml")
    monkeypatch.setenv("FAIL", "1")
    assert scan("3:0.001", "--baseline", "accepted.toml").code == ExitCode.ERROR


def test_a_file_that_is_no_baseline_is_left_alone(scan: Cli, elsewhere: Path) -> None:
    (elsewhere / "notes.toml").write_text("[notes]\n")
    result = scan("3:0.001", "--write-baseline", "notes.toml")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert (elsewhere / "notes.toml").read_text() == "[notes]\n"


# Settings: command line > environment > file > default.

FILE = """
fail_on = "high"
baseline = "accepted.toml"
valid = "{clean}"
limit = 70
formats = ["json"]
timeout = 100
cache = false
"""


def options_of_scan() -> dict[str, str]:
    """The environment variables of the command, with the parameter that each sets."""
    found = {}
    for name, hint in typing.get_type_hints(command.scan, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if getattr(info, "envvar", None):
                found[str(info.envvar)] = name
    return found


def test_every_setting_has_an_environment_variable() -> None:
    known = {f.name for f in fields(Settings)} - {"methods", "source"}
    assert {f"BACKDOORSCAN_{name.upper()}" for name in known} == set(options_of_scan())
    assert set(options_of_scan().values()) <= set(inspect.signature(command.scan).parameters)


def test_a_file_of_its_own(scan: Cli, demo: DemoFiles, elsewhere: Path) -> None:
    (elsewhere / "backdoorscan.toml").write_text(FILE.format(clean=demo.clean))
    (elsewhere / "accepted.toml").touch()
    result = scan("3:0.005", "--valid", demo.clean)
    assert (result.code, result.json["runs"][0]["images"]["count"]) == (ExitCode.OK, 70)


@pytest.mark.parametrize(
    ("variable", "flag"), [("high", None), ("never", "medium"), ("medium", "never"), (None, "low"), (None, None)]
)
def test_precedence(
    variable: str | None, flag: str | None, scan: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file says low, and a finding weighs medium."""
    (elsewhere / "pyproject.toml").write_text('[tool.backdoorscan]\nfail_on = "low"\n')
    if variable:
        monkeypatch.setenv("BACKDOORSCAN_FAIL_ON", variable)
    in_force = flag or variable or "low"
    result = scan("3:0.005", *(["--fail-on", flag] if flag else []))
    assert result.code == (ExitCode.FOUND if in_force in ("low", "medium") else ExitCode.OK)


def test_precedence_of_the_others(scan: Cli, demo: DemoFiles, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "backdoorscan.toml").write_text(FILE.format(clean="none.h5").replace('"json"', '"markdown"'))
    (elsewhere / "accepted.toml").write_text("[[broken")
    (elsewhere / "empty.toml").touch()
    monkeypatch.setenv("BACKDOORSCAN_BASELINE", "empty.toml")
    monkeypatch.setenv("BACKDOORSCAN_LIMIT", "80")
    monkeypatch.setenv("BACKDOORSCAN_FORMATS", "json")
    first = scan("", "--valid", demo.clean)
    assert first.json["runs"][0]["images"]["count"] == 80
    monkeypatch.setenv("BACKDOORSCAN_VALID", "nowhere.h5")
    second = scan("", "--valid", demo.clean, "--limit", 90, "-f", "table")
    assert "on 90 images" in second.out
    monkeypatch.delenv("BACKDOORSCAN_BASELINE")
    assert "accepted.toml" in scan("", "--valid", demo.clean).err


def test_the_manual_lists_every_setting() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `(BACKDOORSCAN_\w+)` \|", text, re.MULTILINE))
    assert set(rows) == {f.name for f in fields(Settings)} - {"methods", "source"}
    assert set(rows.values()) == set(options_of_scan())
