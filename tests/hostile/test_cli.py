"""Hostile files at the command line: exit code 2, one message on stderr, nothing on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.corpus import CASES
from hostile.yard import Yard

from backdoorscan.formats import sandbox

pytestmark = pytest.mark.skipif(not sandbox.available(), reason="this platform has no fork")

EVERY = 10
CHOSEN = [case for case in CASES if case.error is not None][::EVERY]

Answer = tuple[int, str, str]
"""Exit code, stdout and stderr."""

# One process for all commands, as importing everything takes seconds; what it writes is caught at the file descriptors.
SERVER = """
import json, os, sys, tempfile
from backdoorscan.cli import main

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    sys.argv = json.loads(line)
    streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.fileno(), number)
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    said = [os.pread(stream.fileno(), 2**20, 0).decode() for stream in streams]
    print(json.dumps([code, *said]), file=answers, flush=True)
"""


def run(commands: list[list[str]]) -> list[Answer]:
    """What each command answers."""
    lines = "".join(json.dumps(["backdoorscan", *command]) + "\n" for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", SERVER], input=lines, capture_output=True, text=True, timeout=600, check=True
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def command(yard: Yard) -> list[str]:
    options = yard.options()
    arch = ["--arch", options.arch, "--input-shape", "1,4,4"] if options.arch else []
    return ["scan", str(yard.model), *arch, "--no-cache"]


def test_exit_codes_and_messages(tmp_path: Path, good: dict[str, bytes]) -> None:
    yards = []
    for number, case in enumerate(CHOSEN):
        (tmp_path / str(number)).mkdir()
        yards.append(Yard(tmp_path / str(number), good))
        yards[-1].put(case)
    answers = run([command(yard) for yard in yards])
    for case, yard, (code, out, err) in zip(CHOSEN, yards, answers, strict=True):
        first, *more = err.splitlines()
        assert (code, out) == (2, ""), (case.name, out, err)
        assert first.startswith("backdoorscan: ") and all(line.startswith("  ") for line in more), (case.name, err)
        assert "Traceback" not in err and "31337" not in err, (case.name, err)
        assert not yard.canary.exists(), case.name


def test_there_are_dozens_of_every_kind() -> None:
    assert len(CHOSEN) >= 24
    assert {case.family for case in CHOSEN} >= {"code", "other files", "exhaustion", "malformed", "disguise"}


def test_a_process_of_its_own(tmp_path: Path, good: dict[str, bytes]) -> None:
    """The command itself, as it is installed."""
    yard = Yard(tmp_path, good)
    yard.put(next(case for case in CASES if case.name == ".keras: a Lambda of Keras 3"))
    done = subprocess.run(
        [sys.executable, "-m", "backdoorscan", "scan", str(yard.model)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Lambda" in done.stderr and "Traceback" not in done.stderr and not yard.canary.exists()
