import json
from dataclasses import replace
from pathlib import Path

import pytest
from backdoorscan_plugins.attacks import backdoorscan_attacks
from backdoorscan_plugins.attacks.patch import BadNets, SinglePixel
from backdoorscan_plugins.attacks.patches import AllToAll
from backdoorscan_plugins.attacks.pattern import Blended

from backdoorscan.bench.rendering import render_html, render_table
from backdoorscan.bench.report import summarise
from backdoorscan.bench.running import BenchOptions, Judged, Repaired, Scanned
from backdoorscan.bench.spec import ModelSpec
from backdoorscan.bench.zoo import ZooEntry
from backdoorscan.costing import Meter


def judged(data, architecture, attack, p_value, *, success=1.0, target=3, flagged=(), repaired=(), errors=None):
    """One network of which a detector says ``p_value``, and another detector always 1."""
    spec = ModelSpec(data, architecture, attack, target, seed=0)
    entry = ZooEntry(spec, Path("x"), "0", 0.9, success if attack else None, 1.0)
    verdict = "backdoored" if p_value <= 0.01 else "clean"
    scanned = Scanned(
        verdict, p_value, {"one": p_value, "two": None}, flagged, errors or {}, gradient_samples=10, cpu_seconds=2.0
    )
    return Judged(entry, scanned, repaired)


@pytest.fixture
def results(digits):
    done = Repaired("prune", "X=2", 0.9, 0.8, 1.0, 0.1, 0.9, 7, 3.0)
    return [
        judged(digits, "vgg", None, 0.5),
        judged(digits, "vgg", None, 0.004, flagged=[1]),
        judged(digits, "residual", None, 0.9),
        judged(digits, "residual", None, 0.3),
        judged(digits, "vgg", BadNets(), 0.001, flagged=[3], repaired=[done]),
        judged(digits, "vgg", SinglePixel(), 0.002, flagged=[5]),
        judged(digits, "residual", Blended(), 0.6, repaired=[Repaired("prune", error="cannot")]),
        judged(digits, "residual", AllToAll(), 0.01, flagged=[0]),
        judged(digits, "vgg", Blended(), 0.001, success=0.2, flagged=[3], errors={"two": "broken"}),
    ]


@pytest.fixture
def report(results):
    return summarise(results, BenchOptions(), Meter())


def group(report, by, name=""):
    (found,) = (group for group in report.groups if (group.by, group.name) == (by, name))
    return found


def counts(rate):
    return rate and (rate.hits, rate.total)


def test_what_did_not_take_is_listed_and_counted_nowhere(report):
    assert report.not_taken == ["digits vgg blended"]
    assert (report.clean, report.backdoored, report.incomplete) == (4, 4, 1)
    assert len(report.networks) == 9
    assert [row["took"] for row in report.networks] == [True] * 8 + [False]


def test_overall_figures(report):
    overall = group(report, "overall")
    # Of 4 × 4 pairs the clean network looks more suspicious in: 0.6 against 0.5, 0.3, 0.004; 0.01 against 0.004.
    assert overall.area.value == pytest.approx(12 / 16)
    assert counts(overall.found) == (3, 4)
    assert counts(overall.alarms) == (1, 4)
    # All-to-all, of which every label is a target, is left out: badnets right, single-pixel wrong.
    assert counts(overall.hits) == (1, 2)
    assert (report.gradient_samples, report.cpu_seconds) == (10, 2)


@pytest.mark.parametrize(
    ("by", "name", "area", "found", "alarms"),
    [
        ("attack", "badnets", 1.0, (1, 1), (1, 2)),
        ("attack", "blended", 0.5, (0, 1), (0, 2)),
        ("family", "patch", 1 - 1 / 12, (3, 3), (1, 4)),
        ("family", "pattern", 0.5, (0, 1), (0, 2)),
        ("architecture", "vgg", 1.0, (2, 2), (1, 2)),
        ("architecture", "residual", 0.75, (1, 2), (0, 2)),
        ("data", "digits", 0.75, (3, 4), (1, 4)),
        ("detector", "one", 0.75, (3, 4), (1, 4)),
        ("detector", "two", 0.5, (0, 4), (0, 4)),
    ],
)
def test_groups_are_compared_with_clean_networks_of_their_own_pool(report, by, name, area, found, alarms):
    figures = group(report, by, name)
    assert figures.area.value == pytest.approx(area)
    assert (counts(figures.found), counts(figures.alarms)) == (found, alarms)


def test_clean_networks_alone_still_have_a_rate_of_alarms(results):
    report = summarise(results[:4], BenchOptions(), Meter())
    assert {group.by for group in report.groups} == {"overall", "architecture", "data", "detector"}
    assert group(report, "overall").area is None
    assert counts(group(report, "overall").alarms) == (1, 4)
    assert "0 backdoored" in render_table(report, 120, color=False)
    render_html(report)


def test_a_zoo_in_which_nothing_took_has_no_figures(results):
    report = summarise(results[-1:], BenchOptions(), Meter())
    (overall,) = report.groups
    assert (overall.area, overall.found, overall.alarms, overall.hits) == (None, None, None, None)
    assert "digits vgg blended" in render_table(report, 120, color=False)
    assert "digits vgg blended" in render_html(report)


def test_repairs_are_averaged_and_failures_counted(report):
    rows = {(row.method, row.name, row.attack): row for row in report.repairs}
    assert set(rows) == {("prune", "X=2", attack) for attack in ("overall", "badnets", "blended")}
    overall = rows["prune", "X=2", "overall"]
    assert (overall.networks, overall.failed) == (1, 1)
    assert (overall.accuracy_before, overall.accuracy) == (0.9, 0.8)
    assert (overall.attack_success, overall.effectiveness, overall.cpu_seconds) == (0.1, 0.9, 3.0)
    assert (rows["prune", "X=2", "blended"].networks, rows["prune", "X=2", "blended"].effectiveness) == (0, None)
    assert report.cost.gradient_samples == 9 * 10 + 7


def test_a_repair_that_always_fails_still_has_a_row(results):
    failed = [replace(row, repaired=[Repaired("prune", error="no")] if row.repaired else []) for row in results]
    (row, *_) = summarise(failed, BenchOptions(), Meter()).repairs
    assert (row.method, row.name, row.networks, row.failed) == ("prune", "", 0, 2)


def test_json_holds_everything(report):
    data = json.loads(json.dumps(report.to_json()))
    assert data["schema"] == "backdoorscan.bench/1"
    assert data["groups"][0]["area"]["value"] == pytest.approx(0.75)
    network = data["networks"][4]
    assert (network["attack"], network["targets"], network["scan"]["flagged"]) == ("badnets", [3], [3])
    assert network["repairs"][0]["name"] == "X=2"


def test_the_documented_fields_are_those_of_the_report(report):
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    data = report.to_json()
    parts = (data, data["groups"][0], data["groups"][0]["area"], data["repairs"][0], data["networks"][0])
    names = {name for part in parts for name in part} | set(data["networks"][4]["scan"])
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_documented_attacks_are_those_that_there_are():
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for attack in backdoorscan_attacks():
        assert any(row.startswith(f"| `{attack.id}` | {attack.family} | {attack.mapping} |") for row in rows), attack.id


def test_tables_say_what_matters(report):
    text = render_table(report, 140, color=False)
    assert "4 clean and 4 backdoored networks; 1 more whose attack did not take are left out" in text
    assert "0.750 (" in text
    assert "3/4 = 75% (" in text
    assert "digits vgg blended" in text
    assert "90.00% → 80.00%" in text
    assert "\x1b" not in text
    assert "\x1b" in render_table(report, 140, color=True)
    assert max(map(len, render_table(report, 80, color=False).splitlines())) <= 80


def test_the_page_shows_every_network_and_quotes_safely(results, digits):
    evil = replace(digits, name="<script>", source="<b>")
    page = render_html(summarise([judged(evil, "vgg", None, 0.5), *results], BenchOptions(), Meter()))
    assert "<script" not in page
    assert "&lt;script&gt; vgg clean" in page
    assert "digits residual all-to-all" in page
    assert page.startswith("<!DOCTYPE html>")
