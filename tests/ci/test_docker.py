"""The Dockerfile: linted where hadolint is, built where an engine is, and in any case whole and without rights."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what they say."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def copied() -> set[str]:
    """What it takes from the checkout."""
    words = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    return {source for *sources, _ in words for source in sources}


def test_it_copies_all_that_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert copied() == needed | {Path(package).parts[0] for package in wheel}
    assert [name for name in copied() if not (ROOT / name).exists()] == []


def test_what_it_copies_is_all_that_is_sent() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line[0] == "!"} == copied()
    assert any(fnmatch.fnmatch("a/__pycache__", line) for line in lines[1:])


def test_the_container_has_no_rights_and_is_the_program() -> None:
    last = dict(instructions())
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert last["ENTRYPOINT"] == '["backdoorscan"]'
    assert "CMD" not in last
    assert instructions().index(("USER", last["USER"])) > max(
        position for position, (name, _) in enumerate(instructions()) if name in ("RUN", "COPY")
    )


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="there is no hadolint")
def test_lint() -> None:
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def engine() -> bool:
    """Whether images can be built here."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    return subprocess.run([docker, "info"], capture_output=True, timeout=60).returncode == 0


@pytest.mark.slow
def test_build() -> None:
    if not engine():
        pytest.skip("there is no engine to build images")
    subprocess.run(["docker", "build", "--tag", "backdoorscan-test", ROOT], check=True)
    run = ["docker", "run", "--rm", "--network", "none", "--cap-drop", "ALL", "backdoorscan-test"]
    assert subprocess.run([*run, "--version"], capture_output=True, text=True).stdout.startswith("backdoorscan ")
    assert subprocess.run([*run, "scan", "none.h5"], capture_output=True).returncode == 2
