"""docs/report.md against the schemas, the exit codes and real reports."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from backdoorscan import errors
from backdoorscan.errors import ExitCode
from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.report import ScanReport

ROOT = Path(__file__).parents[2]
MANUAL = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
NAMES = ["report-1", "repair-1", "evaluation-1"]


def schema(name: str) -> Any:
    return json.loads((resources.files("backdoorscan.reports") / "schemas" / f"{name}.json").read_text("utf-8"))


def objects(name: str) -> Iterator[dict[str, Any]]:
    """The objects that a schema describes: the report itself, then its parts."""
    whole = schema(name)
    yield whole
    yield from whole["$defs"].values()


def documented() -> dict[str, list[str]]:
    """The fields that the tables of the manual list, by the heading above them."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in MANUAL.splitlines():
        if match := re.fullmatch(r"#+ `(.+)`", line):
            heading = match[1]
        elif line.startswith("#"):
            heading = ""
        elif heading and (match := re.match(r"\| `(\w+)` \|", line)):
            found.setdefault(heading, []).append(match[1])
    return found


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", MANUAL, re.DOTALL | re.MULTILINE)


def exit_codes(text: str) -> dict[int, str]:
    """The rows of a table of exit codes: code -> meaning."""
    _, _, table = text.partition("| exit code | meaning |\n")
    rows = re.match(r"(?:\|.*\n)*", table)
    cells = (
        [[cell.strip(" `*") for cell in line.strip("|").split("|")] for line in rows[0].splitlines()] if rows else []
    )
    return {int(code): meaning for code, meaning in cells if code.isdigit()}


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_sound_and_explains_every_field(name: str) -> None:
    whole = schema(name)
    jsonschema.Draft202012Validator.check_schema(whole)
    assert whole["properties"]["schema"]["const"] == whole["title"] == f"backdoorscan.{name.replace('-', '/')}"
    for part in objects(name):
        assert part["description"]
        assert "additionalProperties" in part
        assert set(part["required"]) <= set(part["properties"])
        unexplained = [field for field, value in part["properties"].items() if not value.get("description")]
        assert unexplained == []


def test_every_report_has_a_schema() -> None:
    assert [kind.schema for kind in (ScanReport, RepairReport, EvaluationReport)] == [schema(n)["title"] for n in NAMES]


def test_every_field_is_documented_and_every_documented_field_exists() -> None:
    known: dict[str, set[str]] = {}
    for name in NAMES:
        for part in objects(name):
            known.setdefault(part["title"], set()).update(part["properties"])
    tables = documented()
    assert {title: set(fields) for title, fields in tables.items()} == known
    assert all(len(fields) == len(set(fields)) for fields in tables.values())


@pytest.mark.parametrize("part", ["cost", "versions", "images", "finding", "trigger", "packed"])
def test_shared_parts_are_the_same_in_every_schema(part: str) -> None:
    first, *others = (schema(name)["$defs"][part] for name in NAMES if part in schema(name)["$defs"])
    assert others
    assert all(other == first for other in others)


def test_exit_codes_are_those_of_the_program() -> None:
    (tree,) = ast.parse(inspect.getsource(ExitCode)).body
    assert isinstance(tree, ast.ClassDef)
    meanings = {}
    for member, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr):
            meanings[ast.literal_eval(member.value)] = ast.literal_eval(text.value)
    assert set(meanings) == {int(code) for code in ExitCode}, errors.__file__
    assert exit_codes(MANUAL) == meanings


def test_exit_codes_of_the_readme_mean_the_same() -> None:
    rows = exit_codes((ROOT / "README.md").read_text(encoding="utf-8"))
    if not rows:
        pytest.skip("README.md has no table of exit codes")
    gist = {0: "clean", 1: "backdoor", 2: "no trustworthy answer", 3: "nothing applicable", 130: "interrupt|stopped"}
    assert set(rows) == {int(code) for code in ExitCode} == set(gist)
    assert [code for code, words in gist.items() if not re.search(words, rows[code].lower())] == []


def test_example_is_a_report(validate: Callable[[Any], None]) -> None:
    (example,) = map(json.loads, blocks("json"))
    validate(example)
    (run,) = example["runs"]
    assert example["verdict"] == run["verdict"] == "backdoored"
    assert run["findings"][0]["p_value"] <= example["alpha"]


def test_example_has_the_shape_of_a_real_report(scanned: Any) -> None:
    def shape(value: Any) -> Any:
        """Keys, and the keys of what is below; options and evidence are cut short in the manual."""
        if isinstance(value, dict):
            cut = {"options", "evidence", "input_ranges_tried"}
            return {key: None if key in cut else shape(item) for key, item in value.items()}
        return [shape(item) for item in value[:1]] if isinstance(value, list) else None

    (example,) = map(json.loads, blocks("json"))
    real = scanned.json
    assert shape(example) == shape(real)
    shown, measured = (report["runs"][0]["detectors"][0] for report in (example, real))
    assert shown["options"].keys() <= measured["options"].keys()
    assert shown["evidence"].keys() <= measured["evidence"].keys()
    label, *_ = measured["evidence"]["units"][0]["labels"]
    assert all(row.keys() <= label.keys() for row in shown["evidence"]["units"][0]["labels"])


def test_python_of_the_manual_unpacks_a_trigger(scanned: Any, elsewhere: Path) -> None:
    (elsewhere / "report.json").write_text(scanned.out)
    names: dict[str, Any] = {}
    (code,) = blocks("python")
    exec(code, names)
    assert names["mask"].sum() == pytest.approx(names["trigger"]["l1"], rel=1e-5)
    assert names["pattern"].shape == (1, 16, 16)


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_jq_of_the_manual_answers(scanned: Any, elsewhere: Path) -> None:
    (elsewhere / "report.json").write_text(scanned.out)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("jq ")]
    done = [subprocess.run(line, shell=True, capture_output=True, text=True) for line in lines]
    findings, gate, labels = done
    assert [result.stderr for result in done] == ["", "", ""]
    (finding,) = scanned.json["runs"][0]["findings"]
    assert findings.stdout.split("\t")[0] == str(finding["target_label"])
    assert (gate.returncode, gate.stdout) == (1, "false\n")
    assert len(labels.stdout.splitlines()) == 10
