"""The formats for machines and for pull requests: golden files, schemas, and what every one of them has to withstand.

After an intended change: ``UPDATE_GOLDEN=1 pytest tests/reports/test_formats.py``, and look at the difference.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from backdoorscan.errors import UsageError
from backdoorscan.findings import Finding, Severity, Verdict
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import Report
from backdoorscan.reports.cyclonedx import CycloneDx
from backdoorscan.reports.html import Html
from backdoorscan.reports.junit import Junit
from backdoorscan.reports.markdown import Markdown
from backdoorscan.reports.sarif import Sarif
from backdoorscan.reports.table import Table

HERE = Path(__file__).parent
FORMATS: dict[type[Reporter], str] = {Sarif: "sarif", Junit: "xml", Markdown: "md", CycloneDx: "cdx.json"}
HOSTILE = "</code>|`<img src=x>`@team #1 [a](http://evil.example) {0} *b*\x1b[2J\u202e\udcff]]>&\ufffe"


def render(format: type[Reporter], report: Report) -> str:
    return format().render(report, Terminal())


def schema(name: str) -> Any:
    return json.loads((HERE / "schemas" / name).read_text("utf-8"))


SARIF = jsonschema.Draft4Validator(schema("sarif-schema-2.1.0.json"), format_checker=jsonschema.FormatChecker())
BILL = jsonschema.Draft7Validator(
    schema("bom-1.6.schema.json"),
    # The parts for licences and signatures, which no bill of ours has.
    registry=Registry(retrieve=lambda _uri: Resource(contents={}, specification=DRAFT7)),
    format_checker=jsonschema.FormatChecker(),
)


def parsed(format: type[Reporter], text: str) -> Any:
    """The document, which has to be valid."""
    if format is Junit:
        return check_junit(text)
    if format is Markdown:
        assert len(text.encode()) < 60_000
        return text
    document = json.loads(text)
    (SARIF if format is Sarif else BILL).validate(document)
    if format is Sarif:
        check_sarif(document)
    return document


def check_junit(text: str) -> ElementTree.Element:
    """What the readers of Jenkins and GitLab agree on, and sums that are right."""
    assert text.isascii()
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    allowed = {"failure", "error", "skipped", "system-out"}
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in root:
        assert suite.tag == "testsuite"
        assert suite.get("name")
        assert [child.tag for child in suite if child.tag != "testcase"] in (
            ["properties"],
            ["properties", "system-out"],
        )
        cases = suite.findall("testcase")
        own = {
            "tests": len(cases),
            **{f"{tag}s": len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "error")},
            "skipped": len(suite.findall("testcase/skipped")),
        }
        assert {name: int(suite.attrib[name]) for name in own} == own
        for case in cases:
            assert {"name", "classname", "time"} == set(case.attrib)
            assert float(case.attrib["time"]) >= 0
            assert len(case) <= 1
            assert {child.tag for child in case} <= allowed
        assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)
        counts = {name: counts[name] + own[name] for name in counts}
    assert {name: int(root.attrib[name]) for name in counts} == counts
    return root


def check_sarif(log: Any) -> None:
    """What the schema cannot say, and what GitHub asks for."""
    categories = [run["automationDetails"]["id"] for run in log["runs"]]
    assert len(set(categories)) == len(categories)
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        names = [rule["id"] for rule in rules]
        assert len(set(names)) == len(names)
        for rule in rules:
            assert 0 <= float(rule["properties"]["security-severity"]) <= 10
            assert len(rule["properties"]["tags"]) <= 20
        prints = [result["partialFingerprints"]["backdoorscan/v1"] for result in run["results"]]
        assert len(set(prints)) == len(prints)
        for result in run["results"]:
            assert names[result["ruleIndex"]] == result["ruleId"]
            (place,) = result["locations"]
            assert place["physicalLocation"]["region"]["startLine"] == 1
            # Other kinds have no level by the standard.
            assert result["kind"] == "fail"


def failed(make: SimpleNamespace) -> Any:
    """A model that could not be scanned."""
    facts = {"path": "broken.h5", "sha256": None}
    return SimpleNamespace(
        run=make.run(
            verdict=Verdict.INCONCLUSIVE,
            complete=False,
            findings=[],
            detectors=[],
            images=None,
            clean_accuracy=None,
            error="broken.h5 is no model.\nIt is empty.",
            not_tested=[],
        ),
        facts=facts,
    )


def unscanned(make: SimpleNamespace) -> Any:
    from dataclasses import replace

    made = failed(make)
    return replace(made.run, model=made.facts)


def suspicion(**changes: Any) -> Finding:
    values: dict[str, Any] = {"detector": "neural-cleanse", "target_label": 2, "p_value": 0.02, "score": 2.1}
    return Finding(**{**values, **changes})


def reports(make: SimpleNamespace) -> Iterator[tuple[str, Report]]:
    """Every kind of report, and every state that a scan can be in."""
    yield "scan", make.scan()
    yield "repair", make.repair()
    yield "evaluation", make.evaluation()
    quiet = make.detector(p_value=0.4)
    clean = make.run(verdict=Verdict.CLEAN, findings=[], detectors=[quiet], otherwise=Verdict.CLEAN)
    yield "clean", make.scan(clean, verdict=Verdict.CLEAN)
    near = make.run(verdict=Verdict.INCONCLUSIVE, findings=[suspicion()])
    yield "suspected", make.scan(near, verdict=Verdict.INCONCLUSIVE)
    silent = make.detector(p_value=None, note="Too few images.")
    mute = make.run(verdict=Verdict.INCONCLUSIVE, findings=[], detectors=[silent])
    yield "no answer", make.scan(mute, verdict=Verdict.INCONCLUSIVE)
    notes = ["accuracy of 25.0% on 380 images is no better than guessing"]
    guessing = make.run(verdict=Verdict.INCONCLUSIVE, findings=[], detectors=[], notes=notes, clean_accuracy=0.25)
    yield "guessing", make.scan(guessing, verdict=Verdict.INCONCLUSIVE)
    broken = make.detector(id="pruner", p_value=None, error="RuntimeError: no convolution", evidence={}, triggers=[])
    half = make.run(verdict=Verdict.INCONCLUSIVE, complete=False, findings=[], detectors=[quiet, broken])
    yield "incomplete", make.scan(half, verdict=Verdict.INCONCLUSIVE, complete=False)
    pair = suspicion(p_value=0.001, source_label=3, detector="source-pairs", score=None)
    yield "source", make.scan(make.run(findings=[pair], detectors=[make.detector(id="source-pairs")]))
    accepted = suspicion(p_value=0.001, suppressed="a watermark", severity=Severity.HIGH)
    yield "accepted", make.scan(make.run(findings=[accepted], otherwise=Verdict.CLEAN))
    facts = {"path": "other/clean.h5", "sha256": "ef" * 32}
    other = make.run(facts=facts, verdict=Verdict.CLEAN, findings=[], detectors=[quiet])
    several = [make.run(), other, unscanned(make)]
    yield "several", make.scan(*several, complete=False)
    yield "left in", make.repair(after=0.5)
    yield "not measured", make.repair(after=None)
    yield "no networks", make.repair(candidates=[])


NAMES = [
    *("scan", "repair", "evaluation", "clean", "suspected", "no answer", "guessing", "incomplete", "source"),
    *("accepted", "several", "left in", "not measured", "no networks"),
]


@pytest.fixture
def every(make: SimpleNamespace) -> dict[str, Report]:
    return dict(reports(make))


@pytest.mark.parametrize("kind", ["scan", "repair", "evaluation", "several"])
@pytest.mark.parametrize("format", FORMATS)
def test_golden(format: type[Reporter], kind: str, every: dict[str, Report]) -> None:
    if kind == "evaluation" and getattr(format, "refuses", ()):
        with pytest.raises(UsageError, match="no place for this report"):
            render(format, every[kind])
        return
    text = render(format, every[kind])
    path = HERE / "golden" / f"{kind}.{FORMATS[format]}"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", [*FORMATS, Table, Html])
def test_every_state_is_valid_and_the_same_twice(format: type[Reporter], name: str, every: dict[str, Report]) -> None:
    if name == "evaluation" and getattr(format, "refuses", ()):
        return  # test_golden
    text = render(format, every[name])
    if format in FORMATS:
        parsed(format, text)
    assert text.endswith("\n")
    assert text == render(format, every[name])


def test_names_are_those_of_the_reports(every: dict[str, Report]) -> None:
    assert list(every) == NAMES


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("scan", ["error"]),
        ("clean", []),
        ("suspected", ["warning"]),
        ("no answer", ["warning"]),
        ("guessing", ["warning"]),
        ("incomplete", ["warning"]),
        ("source", ["error"]),
        ("several", ["error", "warning"]),
        ("repair", []),
        ("left in", ["error", "error"]),
        ("no networks", ["warning"]),
    ],
)
def test_sarif_has_results_for_all_that_is_no_pass(name: str, levels: list[str], every: dict[str, Report]) -> None:
    log = parsed(Sarif, render(Sarif, every[name]))
    assert [result["level"] for run in log["runs"] for result in run["results"]] == levels


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("scan", (1, 0, 0)),
        ("clean", (0, 0, 0)),
        ("suspected", (1, 0, 0)),
        ("no answer", (0, 1, 1)),
        ("incomplete", (0, 1, 0)),
        ("accepted", (0, 0, 1)),
        ("several", (1, 1, 0)),
        ("repair", (0, 0, 0)),
        ("left in", (2, 0, 0)),
        ("no networks", (0, 1, 0)),
    ],
)
def test_junit_fails_what_is_no_pass(name: str, counts: tuple[int, int, int], every: dict[str, Report]) -> None:
    root = parsed(Junit, render(Junit, every[name]))
    assert tuple(int(root.attrib[key]) for key in ("failures", "errors", "skipped")) == counts


def test_sarif_of_an_incomplete_scan_says_so(every: dict[str, Report]) -> None:
    (run,) = json.loads(render(Sarif, every["incomplete"]))["runs"]
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    told = {note["message"]["text"]: note["level"] for note in invocation["toolExecutionNotifications"]}
    assert told["pruner failed: RuntimeError: no convolution"] == "error"
    (run, _, broken) = json.loads(render(Sarif, every["several"]))["runs"]
    assert run["invocations"][0]["executionSuccessful"] is True
    assert broken["invocations"][0]["executionSuccessful"] is False
    assert "hashes" not in broken["artifacts"][0]


def test_sarif_marks_what_a_baseline_accepts(every: dict[str, Report]) -> None:
    (run,) = json.loads(render(Sarif, every["accepted"]))["runs"]
    (result,) = run["results"]
    assert result["suppressions"] == [{"kind": "external", "justification": "a watermark"}]


def test_fingerprints_follow_the_file_and_the_labels_alone(make: SimpleNamespace) -> None:
    def prints(run: Any) -> Any:
        (result,) = json.loads(render(Sarif, make.scan(run)))["runs"][0]["results"]
        return result["partialFingerprints"]

    (finding,) = make.run().findings
    same = make.run(facts={"path": "elsewhere/b.h5"}, findings=[suspicion(target_label=finding.target_label)])
    assert prints(make.run()) == prints(same)
    assert prints(make.run()) != prints(make.run(facts={"sha256": "ef" * 32}))
    assert prints(same) != prints(make.run(findings=[suspicion(target_label=3)]))
    assert prints(same) != prints(make.run(findings=[suspicion(target_label=finding.target_label, source_label=2)]))


@pytest.mark.parametrize(
    ("path", "uri", "base"),
    [
        ("models/a b.h5", "models/a%20b.h5", "%SRCROOT%"),
        ("./x/../a.h5", "a.h5", "%SRCROOT%"),
        ("c:d#e?.h5", "c%3Ad%23e%3F.h5", "%SRCROOT%"),
        ("../a.h5", "../a.h5", None),
        ("/srv/a.h5", "file:///srv/a.h5", None),
        ("\udcff.h5", "%FF.h5", "%SRCROOT%"),
    ],
)
def test_addresses(path: str, uri: str, base: str | None, make: SimpleNamespace) -> None:
    log = parsed(Sarif, render(Sarif, make.scan(make.run(facts={"path": path}))))
    location = log["runs"][0]["artifacts"][0]["location"]
    assert (location["uri"], location.get("uriBaseId")) == (uri, base)


def test_rules_in_the_graph_are_named(make: SimpleNamespace) -> None:
    gates = [
        {"node": "where_1", "label": 2, "verdict": "proven"},
        {"node": "max_2", "label": 1, "verdict": "ordinary"},
    ]
    detector = make.detector(id="graph-logic", evidence={"units": [{"gates": gates}]})
    run = make.run(findings=[suspicion(detector="graph-logic", p_value=1e-9)], detectors=[detector])
    log = parsed(Sarif, render(Sarif, make.scan(run)))["runs"][0]
    names = [place["name"] for place in log["results"][0]["locations"][0]["logicalLocations"]]
    assert names == ["label 2", "where_1"]
    assert "external/mitre-atlas/AML.T0018.001" in log["tool"]["driver"]["rules"][0]["properties"]["tags"]
    assert "AML.T0018.001" in render(CycloneDx, make.scan(run))
    assert "AML.T0018.001" not in render(Sarif, make.scan())


@pytest.mark.parametrize("format", [*FORMATS, Html, Table])
def test_hostile_texts_stay_texts(format: type[Reporter], make: SimpleNamespace) -> None:
    name = HOSTILE.replace("\udcff", "[/bold]")
    detector = make.detector(id=name, note=HOSTILE, error=HOSTILE, version=HOSTILE)
    finding = suspicion(detector=name, suppressed=HOSTILE)
    run = make.run(
        facts={"path": HOSTILE, "format": HOSTILE, "framework": HOSTILE, "architecture": HOSTILE},
        detectors=[detector],
        findings=[finding],
        notes=[HOSTILE],
        not_tested=[HOSTILE],
    )
    text = render(format, make.scan(run, versions={"backdoorscan": HOSTILE}))
    text.encode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ufffe]", text)
    if format in FORMATS:
        parsed(format, text)


def test_markdown_quotes_what_others_wrote(make: SimpleNamespace) -> None:
    run = make.run(facts={"path": HOSTILE}, notes=[HOSTILE, "A * note_ <b>"], not_tested=["~x~"])
    text = render(Markdown, make.scan(run))
    # What is left outside of code and of the tags that are ours.
    outside = re.sub(r"^(`{3,})sh\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"(`+)[^`](?:.*?[^`])?\1(?!`)", "", outside)
    outside = re.sub(r"</?(details|summary|sub)>", "", outside)
    assert "evil" not in outside
    assert "@" not in outside
    assert not re.search(r"(?<!\\)[<\[]", outside)
    assert r"A \* note\_ \<b\>" in text
    assert r"\~x\~" in text
    for line in text.splitlines():
        if line.startswith("| 1 "):
            assert line.count("|") == 10


@pytest.mark.parametrize("classes", [2000])
def test_markdown_fits_a_comment(classes: int, make: SimpleNamespace) -> None:
    findings = [suspicion(target_label=label, p_value=0.001, detector="ü" * 300) for label in range(classes)]
    run = make.run(facts={"path": "ü" * 300}, findings=findings, not_tested=["x" * 300] * 100)
    one = render(Markdown, make.scan(run))
    assert len(one.encode()) < 60_000
    assert "The first 40 of 2,000" in one
    many = render(Markdown, make.scan(*[run] * 100, make.run(verdict=Verdict.CLEAN, findings=[])))
    assert len(many.encode()) < 60_000
    assert re.search(r"\d+ more models: see the JSON report", many)


def test_a_bill_does_not_depend_on_the_run(make: SimpleNamespace) -> None:
    def serial(**changes: Any) -> str:
        return str(json.loads(render(CycloneDx, make.scan(**changes)))["serialNumber"])

    assert serial() == serial()
    assert serial() != serial(seed=1)
    assert "timestamp" not in render(CycloneDx, make.scan())


def test_a_bill_says_what_became_of_the_backdoor(make: SimpleNamespace) -> None:
    def states(after: float | None) -> list[str]:
        report = make.repair(after=after, findings=[suspicion(p_value=0.5)])
        bill = parsed(CycloneDx, render(CycloneDx, report))
        refs = {component["bom-ref"] for component in bill["components"]}
        assert {place["ref"] for found in bill["vulnerabilities"] for place in found["affects"]} == refs
        return [found["analysis"]["state"] for found in bill["vulnerabilities"]]

    assert states(0.0) == ["exploitable", "resolved_with_pedigree", "resolved_with_pedigree"]
    assert states(0.5) == ["exploitable", "exploitable", "exploitable"]
    assert states(None) == ["exploitable", "in_triage", "in_triage"]


def test_notebooks_show_a_table(every: dict[str, Report], make: SimpleNamespace) -> None:
    for name, report in every.items():
        text = report._repr_html_()
        root = ElementTree.fromstring(text)
        head, *rows = root.iter("tr")
        assert {len(row) for row in rows} <= {len(head)}, name
    hostile = make.scan(make.run(facts={"path": HOSTILE}))._repr_html_()
    assert "<img" not in hostile
    assert "\x1b" not in hostile
    assert "backdoored" in make.scan()._repr_html_()
