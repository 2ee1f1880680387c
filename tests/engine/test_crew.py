"""Processes that work for another one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ENDLESS = """
import os, sys, time
from pathlib import Path
from backdoorscan.engine.crew import spread

def work(shared, task, say):
    Path("working").write_text(str(os.getpid()))
    while True:
        time.sleep(60)

if __name__ == "__main__":
    list(spread(work, None, [1], 1, print))
"""


def test_a_process_ends_with_the_one_that_it_works_for(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    working = tmp_path / "working"

    def until(holds):
        patience = time.monotonic() + 120
        while not holds():
            assert time.monotonic() < patience, "it never came to that"
            time.sleep(0.05)

    with subprocess.Popen([sys.executable, "endless.py"], cwd=tmp_path) as process:
        until(lambda: process.poll() is not None or (working.exists() and working.read_text()))
        worker = int(working.read_text())
        process.kill()

    def ended():
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        # Where nobody collects orphans, one that has ended stays in the table.
        state = Path(f"/proc/{worker}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"

    try:
        until(ended)
    finally:
        if not ended():
            os.kill(worker, signal.SIGKILL)
