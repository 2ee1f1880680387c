"""The demo's files, the command line in this process and in one of its own, and plugins from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import marshal
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import h5py
import jsonschema
import numpy as np
import pytest
import torch

from backdoorscan.cli import run
from backdoorscan.demo import DemoFiles
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


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("payload-ran"),)


def write_images(path: Path, data: np.ndarray, label: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = data, label


def add_lambda_layer(path: Path) -> None:
    """Put a Lambda layer before the last layer, with code inside that leaves a file behind."""
    code = compile("lambda x: open('payload-ran', 'w')", "layer", "eval").co_consts[0]
    payload = [base64.encodebytes(marshal.dumps(code)).decode(), None, None]
    layer = {"class_name": "Lambda", "config": {"name": "sneaky", "function": payload, "function_type": "lambda"}}
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"].insert(-1, layer)
        file.attrs["model_config"] = json.dumps(config)


@pytest.fixture(scope="module")
def inputs(demo: DemoFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's files and with all that can be wrong with such files."""
    folder = tmp_path_factory.mktemp("inputs")
    for path in (demo.model, demo.clean_model, demo.clean, demo.poisoned):
        shutil.copy(path, folder)
    whole = demo.model.read_bytes()
    (folder / "text.h5").write_text("This is not a model.\n" * 100)
    (folder / "empty.h5").touch()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.h5").mkdir()
    (folder / "lambda.h5").write_bytes(whole)
    add_lambda_layer(folder / "lambda.h5")
    with h5py.File(demo.clean) as file:
        data, label = file["data"][:40], file["label"][:40]
    write_images(folder / "label12.h5", data, np.where(np.arange(40) == 5, 12, label))
    write_images(folder / "large.h5", np.zeros((40, 1, 20, 20), np.uint8), label)
    write_images(folder / "colour.h5", np.zeros((40, 3, 16, 16), np.uint8), label)
    write_images(folder / "none.h5", data[:0], label[:0])
    write_images(folder / "noise.h5", np.random.default_rng(0).integers(0, 256, data.shape, np.uint8), label)
    torch.save({"weight": torch.zeros(10, 256)}, folder / "weights.pth")
    torch.save(torch.nn.Linear(256, 10), folder / "module.pth")
    torch.save({"weight": torch.zeros(10, 256), "extra": Payload()}, folder / "payload.pth")
    (folder / "arch.py").write_text("import torch\ndef linear():\n    return torch.nn.Linear(256, 10)\n")
    (folder / "broken.toml").write_text("seed = \n")
    (folder / "unknown.toml").write_text("aplha = 0.05\n")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("mine")
    return folder


@pytest.fixture
def here(inputs: Path, elsewhere: Path) -> Path:
    """The current folder, with a copy of ``inputs``."""
    return Path(shutil.copytree(inputs, elsewhere, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SOMEBODY_ELSES = """
from dataclasses import dataclass
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Finding, Judgement
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option

@dataclass(frozen=True, kw_only=True)
class Oracle(Detector):
    "Says what it is told to say."
    id = "{id}"
    level: int = option(1, help="Of nothing.")
    def examine(self, unit, classifier, images, context):
        {examine}
        return Evidence(figures={{"level": self.level}})
    def judge(self, evidence):
        {judge}
        p_value = {p_value}
        findings = [Finding(target_label=3, p_value=p_value, score=1.0)] if p_value is not None else []
        return Judgement(findings=findings, p_value=p_value)

@hookimpl
def backdoorscan_detectors():
    return [Oracle]
"""


@pytest.fixture(scope="session")
def oracle() -> Callable[..., str]:
    """The source of a detector that does and says the like."""

    def source(id: str = "oracle", examine: str = "pass", judge: str = "pass", p_value: float | None = 1.0) -> str:
        return SOMEBODY_ELSES.format(id=id, examine=examine, judge=judge, p_value=p_value)

    return source
