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

from backdoorscan.errors import ExitCode


def interrupt(command: str, ready: Callable[[int], bool], env: dict[str, str]) -> tuple[int, str, str]:
    """Start a command, wait until it is ``ready``, given its process id, and press Ctrl-C."""
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
        while not ready(process.pid):
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
        lambda _: (here / "started").exists(),
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
        "repair model.h5 --valid clean.h5 --channels 1 --channels 2 --channels 3 --channels 4 -o out",
        lambda pid: any((here / f".out.{pid}.tmp").glob("*.h5")),
        {},
    )
    assert (code, out, err) == (ExitCode.INTERRUPTED, "", "backdoorscan: Interrupted.\n")
    assert contents(here) == before
    assert not [path for path in here.iterdir() if path.name.startswith((".", "out"))]
