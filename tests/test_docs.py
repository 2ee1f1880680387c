"""The documents say what the code does."""

import re
from pathlib import Path

import pytest

from backdoorscan.cli import run
from backdoorscan.errors import ExitCode
from backdoorscan.registry import installed

ROOT = Path(__file__).parents[1]
METHODS = [plugin for kind in ("detector", "repairer") for plugin in installed().of_kind(kind)]


def test_the_readme_lists_every_method_as_the_registry_does():
    rows = [f"| {p.id} | {p.kind} | {p.summary} |" for p in sorted(METHODS, key=lambda p: (p.kind, p.id))]
    listed = [
        line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| [\w-]+ \| (det|rep)", line)
    ]
    assert listed == rows


def test_the_readme_lists_every_exit_code():
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [int(code) for code in codes] == [int(code) for code in ExitCode]


@pytest.mark.parametrize("plugin", METHODS, ids=lambda p: f"{p.kind}-{p.id}")
def test_every_method_and_each_of_its_options_is_described(plugin):
    text = (ROOT / "docs" / "methods.md").read_text()
    start = re.search(rf"^## {re.escape(plugin.id)}$", text, re.MULTILINE)
    assert start, f"docs/methods.md has no section on {plugin.id}"
    section = text[start.end() :].split("\n## ")[0]
    missing = [spec.name for spec in plugin.component.options() if f"`{spec.name}`" not in section]
    assert missing == []


def test_commands_in_the_readme_exist(capsys):
    commands = set(re.findall(r"^backdoorscan (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert commands
    for command in sorted(commands):
        assert run([command, "--help"]) == 0
