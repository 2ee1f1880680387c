"""Whatever is thrown at the program: exit code 2, one message that says what to do, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

import backdoorscan
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import BackdoorscanError, ExitCode

Cli = Callable[..., Any]

SCAN = "scan model.h5 --valid clean.h5 "


BAD_FILES = {
    "text file": ("scan text.h5 --valid clean.h5", r"text\.h5 is not a model file of a known format"),
    "truncated file": ("scan cut.h5 --valid clean.h5", r"cut\.h5 is a broken HDF5 file"),
    "Lambda layer": ("scan lambda.h5 --valid clean.h5", "layer 'sneaky' is a Lambda"),
    "label 12": ("scan model.h5 --valid label12.h5", "label 12 does not exist in a model of 10 classes"),
    "larger images": ("scan model.h5 --valid large.h5", r"images of 1×20×20 do not fit model\.h5"),
    "missing model": ("scan missing.h5 --valid clean.h5", r"There is no model file missing\.h5"),
    "missing images": ("scan model.h5 --valid missing.h5", r"missing\.h5 does not exist"),
    "state dict alone": ("scan weights.pth --valid clean.h5", "no architecture(?s:.*)--arch"),
    "whole module": ("scan module.pth --valid clean.h5 --arch arch.py:linear", r"more than weights"),
    "pickled payload": ("scan payload.pth --valid clean.h5 --arch arch.py:linear", r"more than weights"),
}


BAD_FILES_TOO = {
    "empty model": ("scan empty.h5 --valid clean.h5", r"empty\.h5 is empty"),
    "folder as model": ("scan folder.h5 --valid clean.h5", r"folder\.h5 is a folder"),
    "images as model": ("scan clean.h5 --valid clean.h5", r"clean\.h5"),
    "model as images": ("scan model.h5 --valid model.h5", r"model\.h5"),
    "empty images": ("scan model.h5 --valid empty.h5", r"empty\.h5 is empty|empty\.h5"),
    "no images": ("scan model.h5 --valid none.h5", r"none\.h5"),
    "images in colour": ("scan model.h5 --valid colour.h5", r"images of 3×16×16 do not fit model\.h5"),
    "images of something else": ("scan model.h5 --valid noise.h5", "better than guessing"),
    "missing architecture": ("scan weights.pth --valid clean.h5 --arch absent.py:net", r"absent\.py"),
    "architecture misspelt": ("scan weights.pth --valid clean.h5 --arch arch.py:liner", "Did you mean 'linear'"),
    "architecture to spare": ("scan model.h5 --valid clean.h5 --arch arch.py:linear", "Leave --arch out"),
    "missing poisoned images": ("evaluate model.h5 --valid clean.h5 --poisoned missing.h5", r"missing\.h5"),
    "poisoned images of another size": ("evaluate model.h5 --valid clean.h5 --poisoned large.h5", r"large\.h5"),
    "repair of a text file": ("repair text.h5 --valid clean.h5 -o out", r"text\.h5 is not a model file"),
    "repair with label 12": ("repair model.h5 --valid label12.h5 -o out", "label 12"),
    "GoodNet that is none": ("predict model.h5 clean.h5", r"model\.h5 is not a GoodNet"),
}


BAD_USAGE = {
    "unknown detector": (SCAN + "-d neural-cleanze", "no detector 'neural-cleanze'.\n.*Did you mean 'neural-cleanse'"),
    "unknown method": (
        "repair model.h5 --valid clean.h5 -m prunes -o out",
        "no repairer 'prunes'.\n.*Did you mean 'prune'",
    ),
    "unknown format": (SCAN + "-f jsn", "'jsn'.\n.*Did you mean 'json'"),
    "unknown option": (SCAN + "-O neural-cleanse.stepz=3", "'stepz'.\n.*Did you mean 'steps'"),
    "option of the wrong type": (SCAN + "-O neural-cleanse.steps=many", "neural-cleanse.steps = 'many' is not valid"),
    "option out of range": (SCAN + "-O neural-cleanse.steps=0", "neural-cleanse.steps = '0' is not valid"),
    "option without value": (SCAN + "-O neural-cleanse.steps", "is not ID.NAME=VALUE"),
    "option of a repairer": (SCAN + "-O prune.drop=2", "'prune'"),
    "label that is not there": (SCAN + "--labels 99", "--labels names 99.\n.*0 to 9"),
    "labels cut short": (SCAN + "--labels 3-", "--labels 3- is not a list of labels"),
    "labels backwards": (SCAN + "--labels 5-3", "--labels 5-3 is not a list of labels"),
    "labels as words": (SCAN + "--labels seven", "--labels seven is not a list of labels"),
    "alpha above 1": (SCAN + "--alpha 2", "--alpha 2 is not between 0 and 1"),
    "empty input range": (SCAN + "--input-range 255,0", "--input-range 255,0"),
    "input range of one number": (SCAN + "--input-range 255", "--input-range 255 is not two numbers"),
    "mean that is no number": (SCAN + "--mean half", "--mean half is not a list of numbers"),
    "standard deviation of zero": (SCAN + "--std 0", "--std must be positive"),
    "layout": (SCAN + "--layout CHWN", "--layout CHWN is neither NCHW nor NHWC"),
    "layout against the file": (SCAN + "--layout NCHW", "--layout NCHW does not fit"),
    "report into a missing folder": (SCAN + "--limit 40 -o absent/report.json", r"Cannot write absent/report\.json"),
    "folder taken": ("repair model.h5 --valid clean.h5 -o taken", "taken exists already.\n.*--force"),
    "unknown layer": ("repair model.h5 --valid clean.h5 --layer conv -o out", "'conv'"),
    "too many channels": ("repair model.h5 --valid clean.h5 --channels 4000 -o out", "channels = 4000 is too many"),
    "unknown target": ("evaluate model.h5 --valid clean.h5 --poisoned poisoned.h5 --target 10", "--target 10"),
    "missing settings": (f"--config missing.toml {SCAN}", r"missing\.toml"),
    "broken settings": (f"--config broken.toml {SCAN}", r"Cannot read the configuration file broken\.toml"),
    "unknown setting": (f"--config unknown.toml {SCAN}", r"unknown\.toml.*'aplha'.\n.*Did you mean 'alpha'"),
    "unknown command": ("scann model.h5", r"'scann'.* 'scan'"),
    "missing option": ("repair model.h5", r"--valid'\.\n  backdoorscan repair --help"),
    "missing model": ("scan --valid clean.h5", "no model to scan"),
    "option nobody knows": (SCAN + "--bogus", r"--bogus.*\n  backdoorscan scan --help"),
    "misspelt option": (SCAN + "--labls 7", "--labls.*--labels"),
    "global option after the command": (SCAN + "-q", r"-q\n  It goes before the command: backdoorscan -q scan"),
    "limit of zero": (SCAN + "--limit 0", "--limit"),
    "limit as a word": (SCAN + "--limit ten", "--limit"),
    "seed of one and a half": (SCAN + "--seed 1.5", "--seed"),
    "no such colour": (f"--color blue {SCAN}", "--color"),
    "unknown plugin": ("plugins show neural-cleanze", "Did you mean 'neural-cleanse'"),
}


def parametrized(cases: dict[str, tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("command", "says"), cases.values(), ids=cases)


@parametrized({**BAD_FILES, **BAD_USAGE})
def test_bad_input(command: str, says: str, here: Path, cli: Cli, contents: Callable[[Path], dict[str, bytes]]) -> None:
    before = contents(here)
    result = cli(*command.split())
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert re.search(says, result.err), result.err
    assert contents(here) == before


def classes(root: type[BackdoorscanError]) -> set[str]:
    """The names of all errors below one."""
    return {name for own in root.__subclasses__() for name in (own.__name__, *classes(own))}


PICKY = """
from dataclasses import dataclass
from backdoorscan import hookimpl
from backdoorscan.errors import MethodError
from backdoorscan.plugin.repairer import Repairer

@dataclass(frozen=True, kw_only=True)
class Picky(Repairer):
    "Likes no model."
    id = "picky"
    def repair(self, classifier, images, findings, context):
        raise MethodError("picky does not like this model.", hint="Try another method.")

@hookimpl
def backdoorscan_repairers():
    return [Picky]
"""

ERRORS = {
    "UsageError": SCAN + "--labels seven",
    "UnknownNameError": SCAN + "-d neural-cleanze",
    "ArtifactError": "scan cut.h5 --valid clean.h5",
    "UnsupportedModelError": "scan missing-layer.h5 --valid clean.h5",
    "UnsafeModelError": "scan lambda.h5 --valid clean.h5",
    "ImagesError": "scan model.h5 --valid large.h5",
    "ConventionError": "scan model.h5 --valid noise.h5",
    "PluginError": "plugins show broken",
    "MethodError": "repair model.h5 --valid clean.h5 -m picky --no-rescan -o out",
    "OutputError": SCAN + "-o absent/report.json",
}


def test_there_is_a_command_for_every_class_of_errors() -> None:
    assert set(ERRORS) | {"Interrupted"} == {
        name for name in classes(BackdoorscanError) if hasattr(backdoorscan.errors, name)
    }


@pytest.mark.parametrize("name", ERRORS)
def test_every_class_of_errors_in_a_process_of_its_own(
    name: str,
    here: Path,
    program: Cli,
    contents: Callable[[Path], dict[str, bytes]],
    third_party: Callable[..., Any],
) -> None:
    shutil.copy("model.h5", "missing-layer.h5")
    with h5py.File("missing-layer.h5", "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"Flatten"', '"Origami"')
    plugins = [third_party(PICKY, "pickiest"), third_party("import there_is_no_such_module", "broken")]
    before = contents(here)
    path = os.pathsep.join(str(plugin.folder) for plugin in plugins)
    result = program("-v", *ERRORS[name].split(), env={"PYTHONPATH": path})
    assert (result.code, result.out) == (ExitCode.ERROR, "")
    trace, _, message = result.err.rpartition("\nbackdoorscan: ")
    assert f"\nbackdoorscan.errors.{name}: " in trace, result.err
    assert 1 <= len(message.splitlines()) <= 3
    assert contents(here) == before


@pytest.mark.parametrize("length", [1, 7, 8, 9, 96, 2000, 0.25, 0.5, 0.9, -1])
def test_truncated_model(length: float, here: Path, demo: DemoFiles, cli: Cli) -> None:
    whole = demo.model.read_bytes()
    (here / "cut.h5").write_bytes(whole[: round(length * len(whole)) if 0 < length < 1 else int(length)])
    result = cli("scan", "cut.h5", "--valid", "clean.h5")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "cut.h5" in result.err


def test_unknown_setting_in_the_nearest_pyproject(here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "pyproject.toml").write_text("[tool.backdoorscan]\nsede = 3\n")
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    result = cli("scan", "../model.h5", "--valid", "../clean.h5")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert re.search(r"pyproject\.toml 'sede'\.\n.*Did you mean 'seed'", result.err)


@pytest.mark.parametrize(
    "setting", ['alpha = "low"', "seed = 1.5", 'detectors = "neural-cleanse"', "neural-cleanse = 3"]
)
def test_setting_of_the_wrong_type(setting: str, here: Path, cli: Cli) -> None:
    (here / "pyproject.toml").write_text(f"[tool.backdoorscan]\n{setting}\n")
    result = cli(*SCAN.split())
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert setting.split()[0] in result.err


def test_unknown_option_in_the_settings(here: Path, cli: Cli) -> None:
    (here / "pyproject.toml").write_text("[tool.backdoorscan.neural-cleanse]\nstepz = 3\n")
    result = cli(*SCAN.split())
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "Did you mean 'steps'" in result.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("-o absent/report.json", r"Cannot write absent/report\.json: there is no folder"),
        ("-o .", r"\. is a folder"),
        ("--save-triggers absent/t.npz", r"Cannot write absent/t\.npz: there is no folder"),
    ],
)
def test_report_that_cannot_be_written_is_an_error_before_any_work(
    flags: str, says: str, here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backdoorscan.formats.images.load_images", None)  # who works fails
    for command in (SCAN + flags, f"evaluate model.h5 --valid clean.h5 {flags}"):
        if "evaluate" in command and "triggers" in flags:
            continue
        result = cli(*command.split())
        assert result.code == ExitCode.ERROR
        result.assert_one_message()
        assert re.search(says, result.err), result.err


def test_options_of_a_detector_that_does_not_run(
    here: Path, cli: Cli, third_party: Callable[..., Any], oracle: Callable[..., str]
) -> None:
    third_party(oracle())
    result = cli(*SCAN.split(), "-d", "neural-cleanse", "-O", "oracle.level=2")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "Options are set for oracle, which does not run" in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_folder_that_may_not_be_written_to(here: Path, cli: Cli) -> None:
    (here / "locked").mkdir(mode=0o500)
    for command in (SCAN + "--limit 40 -o locked/report.json", "repair model.h5 --valid clean.h5 -o locked/out"):
        result = cli(*command.split())
        assert result.code == ExitCode.ERROR
        result.assert_one_message()
        assert "locked" in result.err


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_traceback_only_where_it_was_asked_for(flag: str, here: Path, cli: Cli) -> None:
    result = cli(flag, "scan", "text.h5", "--valid", "clean.h5")
    assert result.code == ExitCode.ERROR
    assert result.out == ""
    trace, _, message = result.err.partition("\nbackdoorscan: ")
    assert trace.startswith("Traceback (most recent call last):")
    assert "find_loader" in trace
    assert message.startswith("text.h5 is not a model file")
