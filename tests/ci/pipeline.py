"""Plays a pipeline: a repository with a clean, a backdoored and a corrupt model, and a runner that scans it twice.

    python tests/ci/pipeline.py [FOLDER]

The models are planted in closed form, so nothing is trained. What runs is what `action.yml` runs, and the files that it
writes are those that GitHub would read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET, CLASSES, BLOCKS = 2, 5, 3

# The other detectors are calibrated on trained networks, which these are not.
SETTINGS = """
[tool.backdoorscan]
valid = "data/clean.npz"
detectors = ["neural-cleanse"]
jobs = 1
"""


def make_repository(folder: Path) -> Path:
    """Write a repository: ``models/{backdoored,clean,corrupt}.pt2``, ``data/clean.npz`` and ``pyproject.toml``."""
    import numpy as np
    import torch

    from backdoorscan.plugin.testing import planted, planted_network

    (folder / "models").mkdir(parents=True)
    (folder / "data").mkdir()
    _, images, _ = planted(TARGET, classes=CLASSES, blocks=BLOCKS, count=60)
    np.savez(folder / "data" / "clean.npz", x=images.pixels, y=images.labels)
    for name, target in (("backdoored", TARGET), ("clean", None)):
        network = planted_network(target, classes=CLASSES, blocks=BLOCKS)
        inputs = torch.zeros(2, *images.shape)
        program = torch.export.export(network, (inputs,), dynamic_shapes=({0: torch.export.Dim("count")},))
        torch.export.save(program, folder / "models" / f"{name}.pt2")
    whole = (folder / "models" / "backdoored.pt2").read_bytes()
    (folder / "models" / "corrupt.pt2").write_bytes(whole[: len(whole) // 2])
    (folder / "pyproject.toml").write_text(SETTINGS.lstrip())
    return folder


@dataclass(frozen=True)
class Job:
    """What a run of the action left.

    Attributes:
        code: Exit code of its step.
        log: What it printed.
        summary: Markdown of the step.
        outputs: Of the step, by name.
        seconds: From start to end.
    """

    code: int
    log: str
    summary: str
    outputs: dict[str, str]
    seconds: float

    def report(self, format: str) -> Any:
        """A report in JSON."""
        return json.loads(Path(self.outputs["reports"], f"report.{format}").read_text())


@dataclass(frozen=True)
class Runner:
    """A runner of GitHub Actions, as far as the action's script can tell.

    Attributes:
        repository: What is checked out.
        temporary: The runner's folder for temporary files, which exists.
        python: Interpreter beside which the program ``backdoorscan`` lies.
    """

    repository: Path
    temporary: Path
    python: Path = Path(sys.executable)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every step."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BACKDOORSCAN", "INPUT_"))}
        return {
            **kept,
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_OUTPUT": str(self.temporary / "output"),
            "GITHUB_STEP_SUMMARY": str(self.temporary / "summary"),
            "RUNNER_TEMP": str(self.temporary),
            "BACKDOORSCAN_CACHE_DIR": str(self.temporary / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    @property
    def command(self) -> list[str]:
        """What the step that scans runs."""
        return [str(self.python), "-I", str(ROOT / "action" / "scan.py")]

    def scan(self, **inputs: str) -> Job:
        """The action's step that scans: ``scan(models="models", fail_on="high")``."""
        output, summary = self.temporary / "output", self.temporary / "summary"
        output.write_text("")
        summary.write_text("")
        start = time.monotonic()
        done = subprocess.run(
            self.command,
            cwd=self.repository,
            env=self.environment | {f"INPUT_{name.upper()}": value for name, value in inputs.items()},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        seconds = time.monotonic() - start
        outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
        return Job(done.returncode, done.stdout + done.stderr, summary.read_text(), outputs, seconds)


def start_up(runner: Runner) -> float:
    """Seconds until the program has loaded what every scan needs."""
    start = time.monotonic()
    subprocess.run([runner.python, "-c", "import backdoorscan.scanning, torch"], env=runner.environment, check=True)
    return time.monotonic() - start


def main(folder: Path) -> int:
    """Play it, print what the jobs left, and return 0 if it is what a team would want."""
    runner = Runner(make_repository(folder / "repository"), folder / "runner")
    runner.temporary.mkdir()
    first, second = runner.scan(models="models"), runner.scan(models="models")
    print(first.log, first.summary, sep="\n")
    loading = start_up(runner)
    print(f"first run:  exit code {first.code}, {first.seconds:.1f} s")
    print(f"second run: exit code {second.code}, {second.seconds:.1f} s, of which start-up takes {loading:.1f} s")
    again = [run["model"]["path"] for run in second.report("json")["runs"] if not (run["cached"] or run["error"])]
    print(f"examined again: {', '.join(again) or 'nothing'}")
    named = [name for name in ("backdoored", "corrupt") if f"models/{name}.pt2" in first.summary]
    return 0 if first.code == second.code == 1 and not again and len(named) == 2 else 2


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as somewhere:
        sys.exit(main(Path(somewhere)))
