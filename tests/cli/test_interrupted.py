"""Ctrl-C: exit code 130, one message, and nothing half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorscan.errors import ExitCode


def interrupt(command: str, ready: Callable[[], bool], env: dict[str, str]) -> tuple[int, str, str]:
    """Start a command, wait until it is ``ready``, and press Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "backdoorscan", *command.split()],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        patience = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < patience, "it never got there"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    # Python may also end itself with the signal, which a shell reports as 130 too.
    code = ExitCode.INTERRUPTED if process.returncode == -signal.SIGINT else process.returncode
    return code, out, err


STARTED = """
from pathlib import Path
from backdoorscan import hookimpl

@hookimpl
def backdoorscan_scan_started():
    Path("started").touch()
"""


def test_interrupted_scan(
    here: Path, third_party: Callable[..., Any], contents: Callable[[Path], dict[str, bytes]]
) -> None:
    before = contents(here)
    endless = "-O neural-cleanse.steps=1000000 -O neural-cleanse.early_stop_patience=1000000"
    code, out, err = interrupt(
        f"scan model.h5 --valid clean.h5  {endless} -f json -o report.json",
        lambda: (here / "started").exists(),
        third_party(STARTED).env,
    )
    (here / "started").unlink()
    assert (code, out) == (ExitCode.INTERRUPTED, "")
    assert err == "backdoorscan: Interrupted.\n  The same command with --resume goes on where it ended.\n"
    assert contents(here) == before


def test_interrupted_repair_leaves_nothing_half_written(
    here: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    before = contents(here)
    code, out, err = interrupt(
        "repair model.h5 --valid clean.h5 --channels 1 --channels 2 --channels 3 --channels 4 --no-rescan -o out",
        lambda: any(here.glob(".out.*.tmp/*.h5")),
        {},
    )
    assert (code, out, err) == (ExitCode.INTERRUPTED, "", "backdoorscan: Interrupted.\n")
    assert contents(here) == before
    assert not [path for path in here.iterdir() if path.name.startswith((".", "out"))]


HANGING = """
import threading
from dataclasses import dataclass
from pathlib import Path
from backdoorscan import hookimpl
from backdoorscan.findings import Judgement, Unit
from backdoorscan.plugin.detector import Detector

@dataclass(frozen=True, kw_only=True)
class Hanging(Detector):
    "Never ends, and never tells its progress."
    id = "hanging"

    def units(self, classifier, context):
        return [Unit("a"), Unit("b")]

    def examine(self, unit, classifier, images, context):
        Path("started").touch()
        threading.Event().wait()

    def judge(self, evidence):
        return Judgement(p_value=1.0)

@hookimpl
def backdoorscan_detectors():
    return [Hanging]
"""


def test_interrupted_scan_by_a_detector_that_hangs(here: Path, third_party: Callable[..., Any]) -> None:
    code, out, err = interrupt(
        "scan model.h5 --valid clean.h5 -d hanging --jobs 2",
        lambda: (here / "started").exists(),
        third_party(HANGING).env,
    )
    assert (code, out) == (ExitCode.INTERRUPTED, "")
    assert err == "backdoorscan: Interrupted.\n  The same command with --resume goes on where it ended.\n"


def test_a_detector_that_hangs_is_out_of_time(
    here: Path, third_party: Callable[..., Any], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backdoorscan.engine.local._GRACE", 0.1)
    third_party(HANGING)
    command = "scan model.h5 --valid clean.h5 -d hanging --timeout 0.5 --jobs 2 -f json"
    result = cli(*command.split())
    assert result.code == ExitCode.ERROR, result.err
    assert (result.json["verdict"], result.json["complete"]) == ("inconclusive", False)
    assert "hanging ran out of time" in result.json["runs"][0]["detectors"][0]["error"]
