"""What is said before long work of how long it will take."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from backdoorscan.cli import run
from backdoorscan.demo import DemoFiles

ABOUT = r"about \d+ s: [\d,]+ gradient samples on \d+ threads?"


class Screen(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self) -> bool:
        return True


def said(screen: io.StringIO, *arguments: object) -> str:
    """What a command tells on stderr."""
    with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(io.StringIO()):
        run([str(argument) for argument in arguments])
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).split())


@pytest.fixture
def scan(demo: DemoFiles) -> tuple[object, ...]:
    return "scan", demo.clean_model, "--valid", demo.clean, "-d", "head-weights"


def test_a_scan(scan: tuple[object, ...]) -> None:
    assert re.search(f"this scan takes at most {ABOUT}", said(Screen(), *scan))


def test_a_repair(demo: DemoFiles, tmp_path: Path) -> None:
    options = ("--method", "prune", "--channels", 1, "--limit", 60, "-o", tmp_path / "out")
    text = said(Screen(), "repair", demo.model, "--valid", demo.clean, *options, "-f", "json")
    assert re.search(f"each scan in this repair takes {ABOUT}", text)


@pytest.mark.parametrize("flag", ["-q", "--no-progress"])
def test_nobody_waits(flag: str, scan: tuple[object, ...]) -> None:
    assert "takes" not in said(Screen(), flag, *scan)


def test_no_terminal(scan: tuple[object, ...]) -> None:
    assert "takes" not in said(io.StringIO(), *scan)
