"""The demo's files, the command line in this process and in one of its own, and plugins from elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from backdoorscan.cli import run
from backdoorscan.demo import DemoFiles, make_demo
from backdoorscan.registry import installed


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    def assert_one_message(self) -> None:
        """Nothing on stdout; on stderr a message of at most three lines, and nothing before or after it."""
        assert self.out == ""
        first, *rest = self.err.splitlines()
        assert first.startswith("backdoorscan: ")
        assert len(rest) <= 2, self.err
        assert all(line.startswith("  ") and line.strip() for line in rest), self.err


Cli = Callable[..., Result]


def quiet_environment() -> dict[str, str]:
    """This process's environment without anything that steers backdoorscan or the terminal's looks."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("BACKDOORSCAN_")}
    for name in ("FORCE_COLOR", "NO_COLOR", "PYTHONPATH"):
        kept.pop(name, None)
    return {**kept, "TERM": "dumb", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is run for several tests keeps its scans in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKDOORSCAN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, an empty cache and a quiet environment for each test."""
    for name in set(os.environ) - set(quiet := quiet_environment()):
        monkeypatch.delenv(name)
    for name, value in quiet.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BACKDOORSCAN_CACHE_DIR", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def in_process(*arguments: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Result(int(code), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("scan", path, ...)``: the command in this process, quick."""
    return in_process


@pytest.fixture(scope="session")
def program() -> Cli:
    """``program("scan", path, ...)``: the command in a process of its own, slow: it imports torch."""

    def start(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Result:
        command = [sys.executable, "-m", "backdoorscan", *map(str, arguments)]
        kept = {"BACKDOORSCAN_CACHE_DIR": os.environ["BACKDOORSCAN_CACHE_DIR"]}
        environment = {**quiet_environment(), **kept, **(env or {})}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        return Result(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    """A backdoored network, its clean twin, and images."""
    return make_demo(tmp_path_factory.mktemp("cli") / "demo")


@pytest.fixture(scope="session")
def scanned(demo: DemoFiles) -> Result:
    """A scan of the backdoored network by one detector, as JSON."""
    return in_process("scan", demo.model, "--valid", demo.clean, "-d", "neural-cleanse", "-f", "json")


@pytest.fixture(scope="session")
def repaired(demo: DemoFiles, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A repair of the backdoored network with two candidates, as JSON."""
    folder = tmp_path_factory.mktemp("repaired") / "networks"
    images = ("--valid", demo.clean, "--poisoned", demo.poisoned)
    drops = ("--drop", 10, "--drop", 4, "--no-rescan")
    return in_process("repair", demo.model, *images, *drops, "-o", folder, "-f", "json")


@pytest.fixture(scope="session")
def candidates(repaired: Result) -> dict[tuple[str, str], dict[str, Any]]:
    """The repair's rows by name and kind."""
    return {(row["name"], row["kind"]): row for row in repaired.json["candidates"]}


@pytest.fixture(scope="session")
def validate() -> Callable[[Any], None]:
    """Check a report against the schema that it names."""

    def check(report: Any) -> None:
        name, _, version = report["schema"].removeprefix("backdoorscan.").partition("/")
        file = resources.files("backdoorscan.reports") / "schemas" / f"{name}-{version}.json"
        schema = json.loads(file.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(schema).validate(report)

    return check


@dataclass(frozen=True)
class Distribution:
    """A distribution that is importable, and known to importlib.metadata, once its folder is on the path."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """For a process of its own."""
        return {"PYTHONPATH": str(self.folder)}


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Distribution]]:
    """``third_party("def backdoorscan_detectors(): ...")``: a plugin of somebody else's, as if it were installed."""

    def make(source: str, name: str = "strangers") -> Distribution:
        folder = tmp_path / name
        info = folder / f"{name}-2.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}_plugin.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[backdoorscan]\n{name} = {name}_plugin\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, f"{name}_plugin", raising=False)
        installed.cache_clear()
        return Distribution(folder)

    yield make
    installed.cache_clear()
