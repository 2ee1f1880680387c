"""The guide's examples are read, and run where this machine can."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorscan import manifest
from backdoorscan.errors import ExitCode

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_job_for_gitlab(example: Callable[[str], Any], repository: Path, tmp_path: Path) -> None:
    (job,) = example("GitLab CI").values()
    here = tmp_path / "project"
    shutil.copytree(repository, here)
    here.joinpath("models", "backdoored.pt2").unlink()
    cache = job["variables"]["BACKDOORSCAN_CACHE_DIR"].replace("$CI_PROJECT_DIR", str(here))
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(job["script"])],
        cwd=here,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "BACKDOORSCAN_CACHE_DIR": cache,
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == ExitCode.ERROR, done.stderr
    assert "models/corrupt.pt2" in done.stdout
    artifacts = job["artifacts"]
    for name in [*artifacts["paths"], artifacts["reports"]["junit"]]:
        assert (here / name).stat().st_size > 0
    (kept,) = job["cache"]["paths"]
    assert any((here / kept).rglob("*"))
    assert artifacts["when"] == job["cache"]["when"] == "always"


def test_the_guide_lists_every_input() -> None:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    inputs = (ROOT / "action.yml").read_text().split("\ninputs:\n")[1].split("\noutputs:\n")[0]
    assert rows == re.findall(r"^  ([\w-]+):$", inputs, re.MULTILINE)


def test_the_manifest_of_the_guide(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (tmp_path / "models.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    faces, digits = manifest.load(tmp_path / "models.toml", manifest.Entry(file=Path()))
    assert (faces.file, faces.fail_on) == (tmp_path / "models" / "faces.onnx", "high")
    assert digits.read.arch == f"{tmp_path / 'nets.py'}:digits"


def test_the_workflow_of_the_guide(yaml: Any, example: Callable[[str], Any]) -> None:
    workflow, action = example("GitHub Actions"), yaml.safe_load((ROOT / "action.yml").read_text())
    (job,) = workflow["jobs"].values()
    *others, ours = job["steps"]
    assert set(ours["with"]) <= set(action["inputs"])
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in others)
    assert workflow["permissions"] == {}
    assert job["permissions"] == {"contents": "read", "security-events": "write"}
