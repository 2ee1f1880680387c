"""Help: complete, quick, and of use without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import backdoorscan
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


@pytest.mark.parametrize("arguments", [["--help"], ["scan", "--help"], ["--version"], ["scann"]])
def test_torch_is_not_imported_before_it_is_needed(arguments: list[str]) -> None:
    code = f"import sys; from backdoorscan.cli import run; run({arguments!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
