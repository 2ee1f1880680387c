"""The hook for pre-commit, through pre-commit itself."""

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

from backdoorscan.errors import ExitCode
from backdoorscan.registry import installed

ROOT = Path(__file__).parents[2]
HOOKS = ".pre-commit-hooks.yaml"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
PRE_COMMIT = shutil.which("pre-commit", path=PATH)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def project(repository: Path, example: Callable[[str], Any], yaml: Any, tmp_path: Path) -> Path:
    """The repository with the configuration of the guide, whose hook runs the program that is installed here."""
    hooks, here = tmp_path / "hooks", tmp_path / "project"
    hooks.mkdir()
    shutil.copy(ROOT / HOOKS, hooks)
    git(hooks, "init", "--quiet")
    git(hooks, "add", ".")
    git(hooks, "commit", "--quiet", "--message", "Hooks")
    shutil.copytree(repository, here)
    config = example("pre-commit")
    (source,) = config["repos"]
    source |= {"repo": str(hooks), "rev": git(hooks, "rev-parse", "HEAD")}
    source["hooks"][0]["language"] = "system"
    (here / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    git(here, "init", "--quiet")
    return here


@pytest.fixture
def pre_commit(project: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``pre_commit("models/clean.pt2")``: the hook on a commit of these files."""

    def run(*files: str) -> subprocess.CompletedProcess[str]:
        git(project, "add", "--all", "--", *files)
        return subprocess.run(
            [str(PRE_COMMIT), "run", "--verbose", "--color=never"],
            cwd=project,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
                "PATH": PATH,
                "PRE_COMMIT_HOME": str(tmp_path / "home"),
                "BACKDOORSCAN_CACHE_DIR": str(tmp_path / "cache"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.mark.skipif(PRE_COMMIT is None or shutil.which("git") is None, reason="needs pre-commit and git")
def test_a_commit_of_models(pre_commit: Any, project: Path) -> None:
    (project / "data" / "images.h5").write_bytes(b"no model")
    shutil.copy(project / "models" / "corrupt.pt2", project / "--fail-on=never.pt2")
    result = pre_commit("data", "pyproject.toml", ".pre-commit-config.yaml")
    assert (result.returncode, "(no files to check)Skipped" in result.stdout) == (0, True), result.stdout
    result = pre_commit("models/clean.pt2")
    assert (result.returncode, result.stdout.count("Passed")) == (0, 1), result.stdout
    result = pre_commit("models", "--fail-on=never.pt2")
    assert result.returncode == 1
    assert f"exit code: {int(ExitCode.FOUND)}" in result.stdout
    rows = [line.split()[:2] for line in result.stdout.splitlines() if re.match(r" \S+\.pt2 +[A-Z]", line)]
    assert sorted(rows) == [
        ["--fail-on=never.pt2", "NOT"],
        ["models/backdoored.pt2", "BACKDOORED"],
        ["models/clean.pt2", "CLEAN"],
        ["models/corrupt.pt2", "NOT"],
    ]


def test_the_hook_takes_files_by_every_suffix_that_a_loader_writes(yaml: Any) -> None:
    (hook,) = yaml.safe_load((ROOT / HOOKS).read_text())
    suffixes = {plugin.component.suffix for plugin in installed().of_kind("loader")} - {""}
    assert {".h5", ".keras", ".onnx", ".pt", ".pt2", ".safetensors"} <= suffixes
    assert [suffix for suffix in suffixes if not re.search(hook["files"], f"models/net{suffix}")] == []
    assert not re.search(hook["files"], "net.py")
