"""``backdoorscan plugins``: what is installed, by whom, and what is broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import backdoorscan
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode
from backdoorscan.registry import installed
from backdoorscan.scanning import ScanOptions, plan_detectors

Cli = Callable[..., Any]

OURS = {
    ("neural-cleanse", "detector"),
    ("prune", "repairer"),
    ("keras-h5", "loader"),
    ("torch-state-dict", "loader"),
    ("safetensors", "loader"),
    ("table", "reporter"),
    ("json", "reporter"),
    ("html", "reporter"),
}

STRANGER = '''
from dataclasses import dataclass
from typing import Literal
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Finding, Judgement
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option
from backdoorscan.plugin.reporter import Reporter

@dataclass(frozen=True, kw_only=True)
class Coin(Detector):
    """Tosses a coin.

    It lands on its edge.
    """
    id = "coin"
    paper = "Laplace 1812"
    side: Literal["heads", "tails"] = option("heads", help="What to bet on.")
    def examine(self, unit, classifier, images, context):
        return Evidence(figures={"side": self.side})
    def judge(self, evidence):
        return Judgement(findings=[Finding(target_label=4, p_value=0.0, score=9.0)], p_value=0.0)

class Verdict(Reporter):
    id = "verdict"
    summary = "One word."
    def render(self, report, terminal):
        return report.verdict.upper() + "!\\n"

@hookimpl
def backdoorscan_detectors():
    return [Coin]

@hookimpl
def backdoorscan_reporters():
    return [Verdict]
'''


def rows(cli: Cli) -> dict[tuple[str, str], dict[str, str]]:
    result = cli("plugins", "--json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    return {(row["id"], row["kind"]): row for row in result.json}


def test_list_as_json(cli: Cli) -> None:
    found = rows(cli)
    assert set(found) >= OURS
    for key in OURS:
        row = found[key]
        assert list(row) == ["id", "kind", "distribution", "version", "summary", "error"]
        assert (row["distribution"], row["version"]) == ("backdoorscan", metadata.version("backdoorscan"))
        assert row["summary"]
        assert row["error"] == ""
    assert metadata.version("backdoorscan") == backdoorscan.__version__


def test_list_as_a_table(cli: Cli) -> None:
    result = cli("plugins")
    assert (result.code, result.err) == (ExitCode.OK, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert ["id", "kind", "distribution", "version", "summary"] in lines
    assert {tuple(words[:2]) for words in lines} >= OURS


@pytest.mark.parametrize("identifier", ["neural-cleanse", "prune"])
def test_show_prints_docstring_paper_and_every_option(identifier: str, cli: Cli) -> None:
    (plugin,) = (plugin for plugin in installed().plugins if plugin.id == identifier)
    method: Any = plugin.component
    result = cli("plugins", "show", identifier)
    assert (result.code, result.err) == (ExitCode.OK, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{identifier}: {plugin.kind} of backdoorscan {backdoorscan.__version__}"
    assert lines[2] == method.summary()
    assert f"Paper: {method.paper}" in lines
    shown = {line.split()[0]: line for line in lines if line.startswith("  ") and line.rstrip().endswith("]")}
    assert shown.keys() >= {spec.name for spec in method.options()}
    for spec in method.options():
        assert spec.help in shown[spec.name]
        assert f"default {spec.default!r}]" in shown[spec.name]


@pytest.mark.parametrize("command", [("plugins",), ("plugins", "show", "prune")])
@pytest.mark.parametrize(
    ("color", "environment", "colored"),
    [
        ("always", {"NO_COLOR": "1"}, True),
        ("never", {"FORCE_COLOR": "1"}, False),
        ("auto", {}, False),
        ("auto", {"FORCE_COLOR": "1", "TERM": "xterm"}, True),
        ("auto", {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1"}, False),
    ],
)
def test_color(
    command: tuple[str, ...],
    color: str,
    environment: dict[str, str],
    colored: bool,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in cli("--color", color, *command).out) is colored


@pytest.mark.parametrize("identifier", ["keras-h5", "torch-state-dict", "safetensors", "json", "table"])
def test_show_a_format(identifier: str, cli: Cli) -> None:
    result = cli("plugins", "show", identifier)
    assert (result.code, result.err) == (ExitCode.OK, "")
    assert result.out.startswith(f"{identifier}: ")
    assert len(result.out.splitlines()) >= 3


@pytest.mark.parametrize(("name", "near"), [("prun", "prune"), ("neural_cleanse", "neural-cleanse"), ("jsn", "json")])
def test_unknown_id(name: str, near: str, cli: Cli) -> None:
    result = cli("plugins", "show", name)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert f"Did you mean '{near}'?" in result.err


def test_a_strangers_plugin_enters_through_the_same_door(
    cli: Cli, program: Cli, demo: DemoFiles, third_party: Callable[..., Any]
) -> None:
    stranger = third_party(STRANGER)
    row = rows(cli)["coin", "detector"]
    assert (row["distribution"], row["version"], row["summary"]) == ("strangers", "2.5", "Tosses a coin.")
    shown = cli("plugins", "show", "coin").out
    assert "Paper: Laplace 1812" in shown
    assert "side  What to bet on. [heads|tails, default 'heads']" in shown
    command = ["scan", demo.clean_model, "--valid", demo.clean, "-d", "coin", "-O", "coin.side=tails"]
    result = program(*command, "-f", "json", env=stranger.env)
    assert result.code == ExitCode.FOUND
    (detector,) = result.json["runs"][0]["detectors"]
    assert (detector["version"], detector["options"]) == ("2.5", {"side": "tails"})
    assert result.json["runs"][0]["findings"][0]["target_label"] == 4
    assert cli(*command, "-f", "verdict").out == "BACKDOORED!\n"
    assert "heads|tails" in cli(*command[:-1], "coin.side=edge").err


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def def", "SyntaxError"),
        (STRANGER.replace("def backdoorscan_detectors", "def backdoorscan_detector"), "backdoorscan_detector"),
        (STRANGER.replace("def judge", "def sentence"), "does not implement judge"),
    ],
)
def test_a_broken_plugin_is_a_row_and_not_the_end(
    source: str, error: str, cli: Cli, demo: DemoFiles, third_party: Callable[..., Any]
) -> None:
    third_party(source)
    found = rows(cli)
    assert set(found) >= OURS
    assert error in found["strangers", "plugin"]["error"]
    assert not [key for key in found if key[0] in ("coin", "verdict")]
    assert "broken:" in cli("plugins").out
    default = {plugin.id for plugin in installed().of_kind("detector") if plugin.component.default}
    assert {detector.id for _, detector in plan_detectors(ScanOptions(), installed())} == default
    command = ["scan", demo.clean_model, "--valid", demo.clean, "--limit", 60, "-f", "json"]
    assert cli(*command, "-d", "neural-cleanse", "-O", "neural-cleanse.steps=2").json["complete"] is True
    for asked in (("plugins", "show", "strangers"), (*command, "-d", "strangers")):
        result = cli(*asked)
        assert result.code == ExitCode.ERROR
        result.assert_one_message()
        assert error in result.err


def test_a_name_has_one_owner(cli: Cli, third_party: Callable[..., Any]) -> None:
    third_party(STRANGER)
    third_party(STRANGER, "imitators")
    result = cli("plugins", "--json").json
    assert len([row for row in result if row["id"] == "coin"]) == 1
    (broken,) = (row for row in result if row["error"])
    assert broken["kind"] == "plugin"
    assert "another plugin already provides the detector 'coin'" in broken["error"]


KINDS = {"detector": "-d", "repairer": "--method", "reporter": "-f"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> dict[str, Path]:
    """A package of each kind as `plugins new` writes it, by kind."""
    folder = tmp_path_factory.mktemp("packages")
    found = {}
    for kind in KINDS:
        found[kind] = folder / kind
        result = cli("plugins", "new", f"my-own-{kind}", "--kind", kind, "-o", folder / kind)
        assert result.code == ExitCode.OK
        assert sorted(map(Path, result.out.split())) == sorted((folder / kind).iterdir())
        assert f"cd {folder / kind}" in result.err
    return found


def run_in(folder: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def module_of(package: Path) -> Path:
    (module,) = package.glob("backdoorscan_*.py")
    return module


def install(package: Path, site: Path) -> None:
    """Do what `pip install` does with a package of one module, without the network."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        + "".join(f"Requires-Dist: {requirement}\n" for requirement in project["dependencies"])
    )
    entries = project["entry-points"]["backdoorscan"].items()
    (info / "entry_points.txt").write_text("[backdoorscan]\n" + "".join(f"{key} = {value}\n" for key, value in entries))
    shutil.copy(module_of(package), site)


def test_a_new_detector_goes_into_the_current_folder(cli: Cli, elsewhere: Path) -> None:
    assert cli("plugins", "new", "white-square").code == ExitCode.OK
    folder = elsewhere / "backdoorscan-white-square"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "pyproject.toml",
        "backdoorscan_white_square.py",
        "test_backdoorscan_white_square.py",
    }
    assert 'id = "white-square"' in (folder / "backdoorscan_white_square.py").read_text()
    assert "-d white-square" in (folder / "README.md").read_text()
    written = "".join(file.read_text() for file in folder.iterdir())
    assert "$" not in written


@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_a_new_package_pass(kind: str, packages: dict[str, Path]) -> None:
    done = run_in(packages[kind], "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_in_style(kind: str, packages: dict[str, Path]) -> None:
    pytest.importorskip("ruff")
    families = ["--extend-select", "I,UP,B,SIM,RET,RUF,ANN,PTH,PERF,C4"]
    for arguments in (["check", *families, "--no-cache", "."], ["format", "--no-cache", "--check", "."]):
        done = run_in(packages[kind], "ruff", *arguments)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_new_packages_have_sound_types(packages: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    root = Path(__file__).parents[2]  # with the project's own settings, strict too, mypy knows torch already
    files = [str(file) for package in packages.values() for file in package.glob("*.py")]
    done = run_in(root, "mypy", "--config-file", str(root / "pyproject.toml"), *files)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def installed_packages(
    packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Path]]:
    """The new packages as if they were installed."""
    for package in packages.values():
        install(package, tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    installed.cache_clear()
    yield packages
    installed.cache_clear()


def test_new_plugins_are_found_and_run(
    installed_packages: dict[str, Path], cli: Cli, demo: DemoFiles, tmp_path: Path
) -> None:
    listed = rows(cli)
    for kind in installed_packages:
        row = listed[f"my-own-{kind}", kind]
        assert (row["distribution"], row["error"]) == (f"backdoorscan-my-own-{kind}", "")
    result = cli("scan", demo.model, "--valid", demo.clean, "-d", "my-own-detector", "-f", "my-own-reporter")
    assert (result.code, result.out) == (ExitCode.INCONCLUSIVE, f"inconclusive {str(demo.model)!r}\n")
    repair = ("repair", demo.model, "--valid", demo.clean, "--method", "my-own-repairer", "--no-rescan", "-o")
    assert cli(*repair, tmp_path / "repaired").code in (ExitCode.OK, ExitCode.FOUND)
    assert [file.name for file in (tmp_path / "repaired").iterdir()] == ["model_limit=3.h5"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Upper", "cannot be called"),
        ("under_score", "cannot be called"),
        ("../up", "cannot be called"),
        ("-x-", "No such option|cannot be called"),
        ("3d", "cannot be called"),
        ("a--b", "cannot be called"),
        ("a\n", "cannot be called"),
        ("x" * 33, "cannot be called"),
        ("plugins", "a Python package backdoorscan_plugins already"),
        ("neural-cleanse", "a detector 'neural-cleanse' already: of backdoorscan"),
    ],
)
def test_names_that_no_plugin_can_have(name: str, reason: str, cli: Cli, elsewhere: Path) -> None:
    result = cli("plugins", "new", name)
    assert result.code == ExitCode.ERROR
    assert re.search(reason, result.err)
    assert not list(elsewhere.iterdir())


def test_a_name_of_another_kind_is_free(cli: Cli, elsewhere: Path) -> None:
    assert cli("plugins", "new", "x" * 32, "--kind", "reporter").code == ExitCode.OK
    assert cli("plugins", "new", "prune").code == ExitCode.OK


def test_nothing_that_exists_is_touched(cli: Cli, elsewhere: Path) -> None:
    folder = elsewhere / "backdoorscan-mine"
    folder.mkdir()
    (folder / "README.md").write_text("precious")
    (elsewhere / "dangling").symlink_to(elsewhere / "nowhere")
    for arguments in (["mine"], ["other", "-o", folder], ["mine", "-o", folder / "README.md"], ["a", "-o", "dangling"]):
        result = cli("plugins", "new", *arguments)
        assert result.code == ExitCode.ERROR
        assert "exists already" in result.err
    assert [file.name for file in folder.iterdir()] == ["README.md"]
    assert (folder / "README.md").read_text() == "precious"
    assert not (elsewhere / "nowhere").exists()


@pytest.mark.parametrize(
    ("requirement", "fits"),
    [("backdoorscan>=0.0.1", True), ("backdoorscan", True), ("backdoorscan<0.1", False), ("backdoorscan>=99", False)],
)
def test_a_package_for_another_version_is_named(
    requirement: str, fits: bool, cli: Cli, third_party: Callable[..., Any]
) -> None:
    stranger = third_party(STRANGER)
    metadata_file = stranger.folder / "strangers-2.5.dist-info" / "METADATA"
    metadata_file.write_text(metadata_file.read_text() + f"Requires-Dist: numpy>1\nRequires-Dist: {requirement}\n")
    result = cli("plugins", "--json")
    assert "coin" in {row["id"] for row in result.json}
    warning = f"strangers is made for {requirement}; this is {backdoorscan.__version__}."
    assert result.err.startswith(warning) is not fits
    assert cli("-q", "plugins").err == ""
