"""Help: complete, quick, and of use without torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

import backdoorscan
from backdoorscan.cli import _completion, app
from backdoorscan.errors import ExitCode

FEEDING = ["--input-range", "--mean", "--std", "--layout"]
READING = ["--valid", "--arch", "--limit", "--seed", "--threads", "--format", "--output", *FEEDING]
OPTIONS = {
    "scan": [
        "--detector",
        "--option",
        "--labels",
        "--alpha",
        "--timeout",
        "--save-triggers",
        "--save-figures",
        *READING,
    ],
    "repair": [
        "--method",
        "--drop",
        "--channels",
        "--layer",
        "--option",
        "--poisoned",
        "--target",
        "--force",
        "--report",
        "--triggers",
        "--goodnet",
        "--max-drop",
        "--rescan",
        "--no-rescan",
        "--test",
        "--learn-from-poisoned",
        "--report-output",
        *READING,
    ],
    "evaluate": ["--poisoned", "--target", *READING],
    "predict": ["GOODNET", "IMAGE", "--threads"],
    "demo": ["DIR", "--seed", "--threads", "--force"],
    "plugins": ["--json", "show"],
    "plugins show": ["ID"],
}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_every_option(command: str, flag: str, cli: Callable[..., Any]) -> None:
    result = cli(*command.split(), flag)
    assert result.code == ExitCode.OK
    assert result.err == ""
    assert [word for word in OPTIONS[command] if word not in result.out] == []


def test_help_of_the_program_lists_commands_global_options_and_exit_codes(cli: Callable[..., Any]) -> None:
    result = cli("--help")
    assert result.code == ExitCode.OK
    commands = ["scan", "repair", "evaluate", "predict", "demo", "plugins"]
    options = ["--version", "--quiet", "--verbose", "--color", "--no-progress", "--config"]
    words = result.out.split()
    assert [word for word in commands + options if word not in words] == []
    text = " ".join(words)
    codes = ["0 clean", "1 backdoor found", "2 no trustworthy answer", "3 inconclusive", "130 interrupted"]
    assert [code for code in codes if code not in text] == []


def commands() -> list[str]:
    """All commands, those of groups too, as they are typed."""
    found = []
    for name, command in get_command(app).commands.items():
        found += [name, *(f"{name} {below}" for below in getattr(command, "commands", {}))]
    return found


SLOW = ("torch", "numpy", "scipy", "onnx", "h5py", "matplotlib", "jinja2", "rich.markdown", "backdoorscan.registry")


def test_help_and_usage_errors_import_nothing_that_takes_long() -> None:
    lines = [[*command.split(), "--help"] for command in commands()] + [["--help"], ["--version"], ["scann"], []]
    code = (
        "import sys; from backdoorscan.cli import run\n"
        f"for line in {lines!r}:\n"
        "    run(line)\n"
        f"    assert not (found := sys.modules.keys() & {set(SLOW)!r}), (line, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands())
def test_examples_of_help_pages_are_commands_that_can_be_typed(command: str, cli: Callable[..., Any]) -> None:
    _, _, examples = cli(*command.split(), "--help").out.partition("\nExamples:\n")
    for example in examples.splitlines():
        program, *words = shlex.split(example)
        assert program == "backdoorscan"
        own = get_command(app)
        for word in command.split():
            assert words.pop(0) == word
            own = own.commands[word]
        known = {name for param in own.params for name in [*param.opts, *param.secondary_opts]}
        assert {word for word in words if word.startswith("-")} <= known


def test_commands_on_models_have_examples(cli: Callable[..., Any]) -> None:
    lacking = [name for name in commands() if "plugins" not in name and "Examples:" not in cli(name, "--help").out]
    assert lacking == []


def test_help_groups_options_and_shows_defaults(cli: Callable[..., Any]) -> None:
    text = cli("scan", "--help").out
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert {"Arguments:", "Options:", "How it runs:", "The report:", "When to fail:", "Examples:"} <= set(headings)
    assert len(headings) == len(set(headings))
    words = " ".join(text.split())
    assert "[default: 0.01]" in words
    assert "tables [[model]]" in words


def test_no_command_at_all_is_no_verdict(cli: Callable[..., Any]) -> None:
    result = cli()
    assert (result.code, result.out) == (ExitCode.ERROR, "")
    assert "Usage: backdoorscan" in result.err
    assert "  scan " in result.err


def test_a_reader_that_went_away_is_no_verdict() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "backdoorscan", "plugins"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.close()
    assert process.wait(timeout=120) == ExitCode.ERROR


def complete(line: str) -> list[str]:
    """What bash offers after a line."""
    words = line.split(" ")
    env = {
        **os.environ,
        "_BACKDOORSCAN_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run([sys.executable, "-m", "backdoorscan"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("backdoorscan sc", {"scan"}),
        ("backdoorscan scan --fail", {"--fail-on"}),
        ("backdoorscan scan -d neural", {"neural-cleanse"}),
        ("backdoorscan scan -f js", {"json"}),
        ("backdoorscan repair -m au", {"auto"}),
        ("backdoorscan scan -O neural-cl", {"neural-cleanse."}),
        ("backdoorscan scan -O neural-cleanse.ste", {"neural-cleanse.steps="}),
    ],
)
def test_completion(line: str, offered: set[str]) -> None:
    assert set(complete(line)) == offered


def test_completion_offers_plugins_of_others_and_keeps_what_it_found(
    third_party: Callable[..., Any], oracle: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    third_party(oracle())
    offer = _completion.ids("detector")
    assert ("oracle", "Says what it is told to say.") in offer("")
    assert _completion.assignments("oracle.") == [("oracle.level=", "Of nothing.")]
    monkeypatch.setattr(_completion, "_read", None)  # who reads again fails
    assert [name for name, _ in offer("ora")] == ["oracle"]


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, cli: Callable[..., Any]) -> None:
    result = cli(flag)
    assert (result.code, result.out, result.err) == (0, f"backdoorscan {backdoorscan.__version__}\n", "")


def test_the_installed_command_and_the_module_are_the_same_program(program: Callable[..., Any]) -> None:
    assert program("--version").out == f"backdoorscan {backdoorscan.__version__}\n"
    code = "from importlib.metadata import entry_points as e; (s,) = e(group='console_scripts', name='backdoorscan')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; sys.argv[1:] = ['--version']; s.load()()"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"backdoorscan {backdoorscan.__version__}\n")
