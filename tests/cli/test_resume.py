"""Scans that are interrupted, scans that were made before, and what a terminal shows meanwhile."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorscan.cli import _options
from backdoorscan.cli._console import Terminal
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]

COUNTING = """
import os, time
from dataclasses import dataclass
from pathlib import Path
import torch
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Judgement, Unit
from backdoorscan.plugin.detector import Detector
from backdoorscan.trigger import Trigger

def note(what):
    with open("notes", "a") as file:
        file.write(what + "\\n")

@dataclass(frozen=True, kw_only=True)
class Counting(Detector):
    "Counts."
    id = "counting"

    def units(self, classifier, context):
        return [Unit(str(number), (number,)) for number in range(8)]

    def examine(self, unit, classifier, images, context):
        note(f"begun {unit.id}")
        while int(unit.id) > 3 and not Path("go").exists():
            time.sleep(0.01)
            context.progress(0.5)
        mask = torch.rand(1, 16, 16, generator=context.generator(self.id, unit.id))
        note(f"done {unit.id}")
        trigger = Trigger(mask, mask, unit.labels[0])
        return Evidence(figures={"l1": float(mask.sum())}, triggers=[trigger], gradient_samples=2)

    def judge(self, evidence):
        return Judgement(p_value=0.5, figures={"sum": sum(part.figures["l1"] for part in evidence)})

@hookimpl
def backdoorscan_detectors():
    return [Counting]
"""


def notes(here: Path, word: str) -> list[str]:
    """The units that were begun, or done, in order of their names."""
    text = (here / "notes").read_text() if (here / "notes").exists() else ""
    return sorted(line.split()[1] for line in text.splitlines() if line.startswith(word))


def without_times(report: Any) -> Any:
    if isinstance(report, dict):
        return {key: without_times(value) for key, value in report.items() if key not in ("cost", "seconds", "cached")}
    return [without_times(value) for value in report] if isinstance(report, list) else report


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_scan_that_was_ended_goes_on(
    sign: signal.Signals, jobs: int, demo: DemoFiles, cli: Cli, third_party: Callable[..., Any], elsewhere: Path
) -> None:
    env = third_party(COUNTING).env
    cache = Path(os.environ["BACKDOORSCAN_CACHE_DIR"])
    command = ["scan", demo.model, "--valid", demo.clean, "-d", "counting", "-f", "json", "--jobs", str(jobs)]

    def kept() -> int:
        return sum(file.read_bytes().count(b"\n") for file in cache.glob("journals/*.jsonl"))

    process = subprocess.Popen(
        [sys.executable, "-m", "backdoorscan", *map(str, command)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        patience = time.monotonic() + 60
        while kept() < 4 or len(notes(elsewhere, "begun")) < 4 + jobs:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < patience, "it never got there"
            time.sleep(0.02)
        process.send_signal(sign)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert out == ""
    if sign is signal.SIGINT:
        assert process.returncode == ExitCode.INTERRUPTED
        assert err == "backdoorscan: Interrupted.\n  The same command with --resume goes on where it ended.\n"
    assert notes(elsewhere, "done") == ["0", "1", "2", "3"]

    (elsewhere / "go").touch()
    again = cli(*command, "--resume")
    assert (again.code, again.err) == (ExitCode.OK, "resuming: 4 finished units taken over\n")
    assert notes(elsewhere, "done") == [str(number) for number in range(8)]
    assert again.json["cost"]["gradient_samples"] == 16
    assert list((cache / "journals").iterdir()) == []
    whole = cli(*command, "--no-cache")
    assert len(notes(elsewhere, "done")) == 16
    assert without_times(whole.json) == without_times(again.json)


QUICK = ["-d", "neural-cleanse", "-O", "neural-cleanse.steps=3", "--limit", "60", "-f", "json"]


def test_a_scan_that_was_made_before(demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]) -> None:
    command = ["scan", demo.model, "--valid", demo.clean, *QUICK]
    first, second = cli(*command), cli(*command)
    assert first.err == ""
    assert re.fullmatch(
        r"answered from the cache, made on \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; --no-cache scans anew\n", second.err
    )
    validate(second.json)
    assert (first.json["cached"], second.json["cached"]) == (False, True)
    assert second.out.replace('"cached": true', '"cached": false') == first.out
    assert second.code == first.code
    assert cli("-q", *command).err == ""
    anew = cli(*command, "--no-cache")
    assert (anew.json["cached"], anew.err) == (False, "")
    assert anew.json["cost"] != first.json["cost"]


def test_no_cache_keeps_nothing(demo: DemoFiles, cli: Cli) -> None:
    command = ["scan", demo.model, "--valid", demo.clean, *QUICK]
    cli(*command, "--no-cache")
    assert not [path for path in Path(os.environ["BACKDOORSCAN_CACHE_DIR"]).rglob("*") if path.is_file()]
    assert cli(*command).json["cached"] is False


def test_where_it_is_kept(demo: DemoFiles, cli: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["scan", demo.model, "--valid", demo.clean, *QUICK]
    cli(*command, "--cache-dir", "mine")
    assert len(list((elsewhere / "mine" / "scans").iterdir())) == 1
    assert cli(*command).json["cached"] is False
    monkeypatch.setenv("BACKDOORSCAN_CACHE_DIR", str(elsewhere / "mine"))
    assert cli(*command).json["cached"] is True
    monkeypatch.delenv("BACKDOORSCAN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    cli(*command)
    assert (elsewhere / "xdg" / "backdoorscan" / "scans").is_dir()


def test_a_folder_that_cannot_be_written_is_one_warning(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "file").touch()
    result = cli("scan", demo.model, "--valid", demo.clean, *QUICK, "--cache-dir", "file")
    (line,) = result.err.splitlines()
    assert line.startswith("warning: nothing is kept in the cache: Cannot write file")
    assert result.json["complete"] is True


def test_jobs_are_the_usable_cores(
    demo: DemoFiles, cli: Cli, third_party: Callable[..., Any], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backdoorscan import scanning

    assert 1 <= _options.usable_cores() <= (os.cpu_count() or 1)
    seen = []
    real = scanning.scan

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append(arguments[3].jobs)
        return real(*arguments, **named)

    monkeypatch.setattr(scanning, "scan", spy)
    monkeypatch.setattr(_options, "usable_cores", lambda: 7)
    command = ["scan", demo.model, "--valid", demo.clean, *QUICK]
    cli(*command)
    cli(*command, "-j", 3)
    monkeypatch.setenv("BACKDOORSCAN_JOBS", "2")
    cli(*command)
    assert seen == [7, 3, 2]


def test_without_clean_images(demo: DemoFiles, cli: Cli, validate: Callable[[Any], None], elsewhere: Path) -> None:
    command = ["-d", "neural-cleanse"]
    result = cli("scan", demo.model, *command, "-f", "json")
    validate(result.json)
    (run,) = result.json["runs"]
    assert result.code == ExitCode.FOUND
    assert [finding["target_label"] for finding in run["findings"]] == [demo.target]
    assert (run["images"]["path"], run["images"]["synthetic"], run["clean_accuracy"]) == (None, True, None)
    assert run["images"]["made"] == run["images"]["count"] >= 50
    spent = sum(detector["gradient_samples"] for detector in run["detectors"])
    assert result.json["cost"]["gradient_samples"] == spent + 60 * 60
    table = cli("scan", demo.model, *command)
    lines = table.out.splitlines()
    assert "input 0..1 (assumed)" in lines[1]
    assert lines[2] == f"{run['images']['made']} images made from the model"
    notes = [line for line in lines if line.startswith("note: no clean images: the scan worked on images made from")]
    assert len(notes) == 1
    assert table.err.endswith(f"next: backdoorscan repair {demo.model} --valid DATA\n")
    cli("scan", demo.model, *command, "-f", "html", "-o", "page.html")
    page = (elsewhere / "page.html").read_text()
    assert "its verdict is less certain" in page
    assert "--valid" not in page
    assert cli("scan", demo.clean_model, *command).code == ExitCode.OK


def test_few_clean_images(demo: DemoFiles, cli: Cli, validate: Callable[[Any], None]) -> None:
    command = ["scan", demo.model, "--valid", demo.clean, "--limit", 10, "-d", "neural-cleanse"]
    result = cli(*command, "-f", "json")
    validate(result.json)
    images = result.json["runs"][0]["images"]
    assert images["count"] - images["made"] == 10
    assert f"on 10 images, {images['made']} images made from the model" in cli(*command).out


@pytest.mark.parametrize("shape", ["3,32", "1,0,3", "a,b,c", "1,16,16,1"])
def test_input_shape_that_cannot_be(shape: str, demo: DemoFiles, cli: Cli) -> None:
    result = cli("scan", demo.model, "--input-shape", shape)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert f"--input-shape {shape} is not C,H,W" in result.err


def test_valid_is_said_to_be_optional(cli: Cli) -> None:
    text = re.sub(r"[\s│]+", " ", cli("scan", "--help").out)
    assert "Optional: without them the scan makes images from the model" in text
    assert "--resume" in text


class Screen(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self) -> bool:
        return True


def drawn(steps: list[tuple[str, float]], terminal: Terminal, screen: io.StringIO) -> list[str]:
    """What a terminal shows after each step, as text."""
    with contextlib.redirect_stderr(screen), terminal.watching() as observer:
        for stage, fraction in steps:
            observer(stage, fraction)
            time.sleep(0.15)  # the screen is drawn ten times a second
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()


def test_a_terminal_shows_the_detector_the_part_done_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    steps = [("reading the model", 0.0), ("neural-cleanse", 0.0), ("neural-cleanse", 0.25), ("neural-cleanse", 0.5)]
    lines = drawn([*steps, ("gangsweep", 0.1)], Terminal(), Screen())
    shown = [line for line in lines if line.startswith("neural-cleanse")]
    assert any(re.search(r" 50% 0:00:\d\d left 0:00:\d\d", line) for line in shown), shown
    last = next(position for position, line in enumerate(lines) if line.startswith("gangsweep"))
    assert not any(line.startswith("reading") for line in lines[last:])


def test_another_round_begins_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    lines = drawn([("nc", 0.0), ("nc", 1.0), ("nc", 0.2), ("nc", 0.4)], Terminal(), Screen())
    shown = [int(match[1]) for line in lines if (match := re.search(r"^nc .* (\d+)% ", line))]
    assert shown.index(100) < len(shown) - 1 - shown[::-1].index(40)
    assert any(re.search(r"^nc .* 40% 0:00:\d\d left 0:00:\d\d", line) for line in lines)


@pytest.mark.parametrize(
    ("terminal", "screen"),
    [(Terminal(), io.StringIO), (Terminal(quiet=True), Screen), (Terminal(progress=False), Screen)],
)
def test_elsewhere_nothing_is_shown(
    terminal: Terminal, screen: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert drawn([("nc", 0.5)], terminal, screen()) == []


def test_a_kept_report_is_whole_json(demo: DemoFiles, cli: Cli) -> None:
    cli("scan", demo.model, "--valid", demo.clean, *QUICK)
    (path,) = (Path(os.environ["BACKDOORSCAN_CACHE_DIR"]) / "scans").iterdir()
    assert json.loads(path.read_text()).keys() == {"made", "digest", "report"}
