"""``backdoorscan plugins``: what is installed, by whom, and what is broken."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

import backdoorscan
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode
from backdoorscan.registry import installed

Cli = Callable[..., Any]

OURS = {
    ("neural-cleanse", "detector"),
    ("prune", "repairer"),
    ("keras-h5", "loader"),
    ("torch-state-dict", "loader"),
    ("safetensors", "loader"),
    ("table", "reporter"),
    ("json", "reporter"),
    ("html", "reporter"),
}

STRANGER = '''
from dataclasses import dataclass
from typing import Literal
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Finding, Judgement
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option
from backdoorscan.plugin.reporter import Reporter

@dataclass(frozen=True, kw_only=True)
class Coin(Detector):
    """Tosses a coin.

    It lands on its edge.
    """
    id = "coin"
    paper = "Laplace 1812"
    side: Literal["heads", "tails"] = option("heads", help="What to bet on.")
    def examine(self, unit, classifier, images, context):
        return Evidence(figures={"side": self.side})
    def judge(self, evidence):
        return Judgement(findings=[Finding(target_label=4, p_value=0.0, score=9.0)], p_value=0.0)

class Verdict(Reporter):
    id = "verdict"
    summary = "One word."
    def render(self, report, terminal):
        return report.verdict.upper() + "!\\n"

@hookimpl
def backdoorscan_detectors():
    return [Coin]

@hookimpl
def backdoorscan_reporters():
    return [Verdict]
'''


def rows(cli: Cli) -> dict[tuple[str, str], dict[str, str]]:
    result = cli("plugins", "--json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    return {(row["id"], row["kind"]): row for row in result.json}


def test_list_as_json(cli: Cli) -> None:
    found = rows(cli)
    assert set(found) >= OURS
    for key in OURS:
        row = found[key]
        assert list(row) == ["id", "kind", "distribution", "version", "summary", "error"]
        assert (row["distribution"], row["version"]) == ("backdoorscan", metadata.version("backdoorscan"))
        assert row["summary"]
        assert row["error"] == ""
    assert metadata.version("backdoorscan") == backdoorscan.__version__


def test_list_as_a_table(cli: Cli) -> None:
    result = cli("plugins")
    assert (result.code, result.err) == (ExitCode.OK, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert ["id", "kind", "distribution", "version", "summary"] in lines
    assert {tuple(words[:2]) for words in lines} >= OURS


@pytest.mark.parametrize("identifier", ["neural-cleanse", "prune"])
def test_show_prints_docstring_paper_and_every_option(identifier: str, cli: Cli) -> None:
    (plugin,) = (plugin for plugin in installed().plugins if plugin.id == identifier)
    method: Any = plugin.component
    result = cli("plugins", "show", identifier)
    assert (result.code, result.err) == (ExitCode.OK, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{identifier}: {plugin.kind} of backdoorscan {backdoorscan.__version__}"
    assert lines[2] == method.summary()
    assert f"Paper: {method.paper}" in lines
    shown = {line.split()[0]: line for line in lines if line.startswith("  ") and line.rstrip().endswith("]")}
    assert shown.keys() >= {spec.name for spec in method.options()}
    for spec in method.options():
        assert spec.help in shown[spec.name]
        assert f"default {spec.default!r}]" in shown[spec.name]


@pytest.mark.parametrize("identifier", ["keras-h5", "torch-state-dict", "safetensors", "json", "table"])
def test_show_a_format(identifier: str, cli: Cli) -> None:
    result = cli("plugins", "show", identifier)
    assert (result.code, result.err) == (ExitCode.OK, "")
    assert result.out.startswith(f"{identifier}: ")
    assert len(result.out.splitlines()) >= 3


@pytest.mark.parametrize(("name", "near"), [("prun", "prune"), ("neural_cleanse", "neural-cleanse"), ("jsn", "json")])
def test_unknown_id(name: str, near: str, cli: Cli) -> None:
    result = cli("plugins", "show", name)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert f"Did you mean '{near}'?" in result.err


def test_a_strangers_plugin_enters_through_the_same_door(
    cli: Cli, program: Cli, demo: DemoFiles, third_party: Callable[..., Any]
) -> None:
    stranger = third_party(STRANGER)
    row = rows(cli)["coin", "detector"]
    assert (row["distribution"], row["version"], row["summary"]) == ("strangers", "2.5", "Tosses a coin.")
    shown = cli("plugins", "show", "coin").out
    assert "Paper: Laplace 1812" in shown
    assert "side  What to bet on. [heads|tails, default 'heads']" in shown
    command = ["scan", demo.clean_model, "--valid", demo.clean, "-d", "coin", "-O", "coin.side=tails"]
    result = program(*command, "-f", "json", env=stranger.env)
    assert result.code == ExitCode.FOUND
    (detector,) = result.json["runs"][0]["detectors"]
    assert (detector["version"], detector["options"]) == ("2.5", {"side": "tails"})
    assert result.json["runs"][0]["findings"][0]["target_label"] == 4
    assert cli(*command, "-f", "verdict").out == "BACKDOORED!\n"
    assert "heads|tails" in cli(*command[:-1], "coin.side=edge").err


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def def", "SyntaxError"),
        (STRANGER.replace("def backdoorscan_detectors", "def backdoorscan_detector"), "backdoorscan_detector"),
        (STRANGER.replace("def judge", "def sentence"), "does not implement judge"),
    ],
)
def test_a_broken_plugin_is_a_row_and_not_the_end(
    source: str, error: str, cli: Cli, demo: DemoFiles, third_party: Callable[..., Any]
) -> None:
    third_party(source)
    found = rows(cli)
    assert set(found) >= OURS
    assert error in found["strangers", "plugin"]["error"]
    assert not [key for key in found if key[0] in ("coin", "verdict")]
    assert "broken:" in cli("plugins").out
    command = ["scan", demo.clean_model, "--valid", demo.clean, "--limit", 60, "-f", "json"]
    assert cli(*command, "-O", "neural-cleanse.steps=2").json["complete"] is True
    for asked in (("plugins", "show", "strangers"), (*command, "-d", "strangers")):
        result = cli(*asked)
        assert result.code == ExitCode.ERROR
        result.assert_one_message()
        assert error in result.err


def test_a_name_has_one_owner(cli: Cli, third_party: Callable[..., Any]) -> None:
    third_party(STRANGER)
    third_party(STRANGER, "imitators")
    result = cli("plugins", "--json").json
    assert len([row for row in result if row["id"] == "coin"]) == 1
    (broken,) = (row for row in result if row["error"])
    assert broken["kind"] == "plugin"
    assert "another plugin already provides the detector 'coin'" in broken["error"]
