"""What a pipeline sees: an exit code, and on stderr one message, whatever is thrown at the program."""

from __future__ import annotations

import base64
import json
import marshal
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]

RAN = "payload-ran"
"""What a payload makes, in the current folder, where it gets to run."""


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(RAN),)


def write_images(path: Path, data: np.ndarray, label: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = data, label


def add_lambda_layer(path: Path) -> None:
    """Put a Lambda layer before the last layer, with code inside that leaves a file behind."""
    code = compile(f"lambda x: open({RAN!r}, 'w')", "layer", "eval").co_consts[0]
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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

SCAN = "scan model.h5 --valid clean.h5 "
TWIN = "scan clean_model.h5 --valid clean.h5 "
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
    "unknown plugin": ("plugins show neural-cleanze", "Did you mean 'neural-cleanse'"),
}


def parametrized(cases: dict[str, tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("command", "says"), cases.values(), ids=cases)


@parametrized(BAD_FILES)
def test_bad_files(command: str, says: str, here: Path, program: Cli) -> None:
    before = contents(here)
    result = program(*command.split())
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert re.search(says, result.err), result.err
    assert contents(here) == before


@parametrized({**BAD_FILES_TOO, **BAD_USAGE})
def test_bad_input(command: str, says: str, here: Path, cli: Cli) -> None:
    before = contents(here)
    result = cli(*command.split())
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert re.search(says, result.err), result.err
    assert contents(here) == before


@pytest.mark.parametrize("length", [1, 7, 8, 9, 96, 2000, 0.25, 0.5, 0.9, -1])
def test_truncated_model(length: float, here: Path, demo: DemoFiles, cli: Cli) -> None:
    whole = demo.model.read_bytes()
    (here / "cut.h5").write_bytes(whole[: round(length * len(whole)) if 0 < length < 1 else int(length)])
    result = cli("scan", "cut.h5", "--valid", "clean.h5")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "cut.h5" in result.err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("scann model.h5", "Did you mean 'scan'"),
        ("repair model.h5", "--valid"),
        ("scan --valid clean.h5", "model"),
        (SCAN + "--bogus", "--bogus"),
        (SCAN + "--labls 7", "--labels"),
        (SCAN + "--limit 0", "--limit"),
        (SCAN + "--limit ten", "--limit"),
        (SCAN + "--seed 1.5", "--seed"),
        (f"--color blue {SCAN}", "--color"),
    ],
)
def test_misspelt_command_lines(command: str, says: str, here: Path, cli: Cli) -> None:
    result = cli(*command.split())
    assert result.code == ExitCode.ERROR
    assert result.out == ""
    assert says in result.err
    assert "Traceback" not in result.err


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


def oracle(id: str = "oracle", examine: str = "pass", judge: str = "pass", p_value: float | None = 1.0) -> str:
    """The source of a detector that does and says the like."""
    return SOMEBODY_ELSES.format(id=id, examine=examine, judge=judge, p_value=p_value)


def fails(id: str = "failing") -> str:
    return oracle(id, examine="raise ValueError('no such layer')")


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


@pytest.mark.parametrize(
    ("verb", "flags"), [("scan", ["-O", "neural-cleanse.steps=3", "--limit", "60"]), ("evaluate", [])]
)
def test_what_the_architecture_prints_is_not_in_the_report(verb: str, flags: list[str], here: Path, cli: Cli) -> None:
    (here / "chatty.py").write_text(
        "import torch\nprint('hello')\ndef net():\n    print('there')\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))\n"
    )
    with h5py.File(here / "clean.h5") as file:
        pixels, labels = file["data"][()].reshape(-1, 256) / 255, file["label"][()].astype(int)
    centres = np.stack(
        [pixels[labels == label].mean(0) for label in range(10)]
    )  # the nearest one is better than chance
    weight = torch.tensor(centres, dtype=torch.float32)
    torch.save({"1.weight": weight, "1.bias": -(weight**2).sum(1) / 2}, here / "nearest.pth")
    command = f"{verb} nearest.pth --valid clean.h5 --arch chatty.py:net --input-range 0,1 -f json"
    result = cli(*command.split(), *flags)
    assert result.code != ExitCode.ERROR, result.err
    assert result.json["schema"].startswith("backdoorscan.")
    assert {"hello", "there"} <= set(result.err.splitlines())


def test_options_of_a_detector_that_does_not_run(here: Path, cli: Cli, third_party: Callable[..., Any]) -> None:
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


def test_clean(here: Path, program: Cli) -> None:
    result = program(*(TWIN + "-f json").split())
    assert result.code == ExitCode.OK
    assert result.json["verdict"] == "clean"
    assert result.err == ""


def test_backdoored(here: Path, demo: DemoFiles, program: Cli) -> None:
    result = program(*(SCAN + "-f json").split())
    assert result.code == ExitCode.FOUND
    assert [finding["target_label"] for finding in result.json["runs"][0]["findings"]] == [demo.target]
    assert result.err == ""


def test_inconclusive_where_nothing_can_be_compared(here: Path, program: Cli) -> None:
    result = program(*(SCAN + "--labels 7 -f json").split())
    assert result.code == ExitCode.INCONCLUSIVE
    (run,) = result.json["runs"]
    assert (run["verdict"], run["complete"], run["findings"]) == ("inconclusive", True, [])
    assert any("nothing to compare" in detector["note"] for detector in run["detectors"])
    assert result.err == ""


@pytest.mark.parametrize(
    ("p_value", "code", "verdict"),
    [
        (0.0, ExitCode.FOUND, "backdoored"),
        (0.01, ExitCode.FOUND, "backdoored"),
        (0.011, ExitCode.INCONCLUSIVE, "inconclusive"),
        (0.03, ExitCode.INCONCLUSIVE, "inconclusive"),
        (0.031, ExitCode.OK, "clean"),
        (1.0, ExitCode.OK, "clean"),
        (None, ExitCode.INCONCLUSIVE, "inconclusive"),
    ],
)
def test_thresholds(
    p_value: float | None, code: int, verdict: str, here: Path, cli: Cli, third_party: Callable[..., Any]
) -> None:
    third_party(oracle(p_value=p_value))
    result = cli(*SCAN.split(), "-d", "oracle", "-f", "json")
    assert (result.code, result.json["verdict"]) == (code, verdict)
    assert len(result.json["runs"][0]["findings"]) == (p_value is not None and verdict != "clean")


def test_alpha_moves_the_thresholds(here: Path, cli: Cli, third_party: Callable[..., Any]) -> None:
    third_party(oracle(p_value=0.02))
    codes = [cli(*SCAN.split(), "-d", "oracle", "--alpha", alpha).code for alpha in (0.001, 0.01, 0.05)]
    assert codes == [ExitCode.OK, ExitCode.INCONCLUSIVE, ExitCode.FOUND]


def test_a_scan_out_of_time_never_passes(here: Path, cli: Cli) -> None:
    result = cli(*(TWIN + "--timeout 0 -f json").split())
    assert result.code == ExitCode.ERROR
    assert (result.json["verdict"], result.json["complete"]) == ("inconclusive", False)
    assert "ran out of time" in result.json["runs"][0]["detectors"][0]["error"]


@pytest.mark.parametrize(
    ("p_value", "code", "verdict"),
    [
        (0.001, ExitCode.FOUND, "backdoored"),
        (0.02, ExitCode.ERROR, "inconclusive"),
        (1, ExitCode.ERROR, "inconclusive"),
    ],
)
def test_a_proven_backdoor_outranks_a_failed_detector(
    p_value: float, code: int, verdict: str, here: Path, cli: Cli, third_party: Callable[..., Any]
) -> None:
    third_party(oracle(p_value=p_value), "sages")
    third_party(fails(), "bunglers")
    result = cli(*SCAN.split(), "-d", "oracle", "-d", "failing", "-f", "json")
    assert result.code == code
    assert (result.json["verdict"], result.json["complete"]) == (verdict, False)
    errors = {detector["id"]: detector["error"] for detector in result.json["runs"][0]["detectors"]}
    assert errors["oracle"] == ""
    assert "ValueError: no such layer" in errors["failing"]


@pytest.mark.parametrize("part", ["examine", "judge"])
def test_a_failed_detector_alone_gives_no_verdict(
    part: str, here: Path, cli: Cli, third_party: Callable[..., Any]
) -> None:
    third_party(oracle(**{part: "raise ValueError('no such layer')"}))
    result = cli(*SCAN.split(), "-d", "oracle")
    assert result.code == ExitCode.ERROR
    assert "INCONCLUSIVE" in result.out
    assert "ValueError: no such layer" in result.out


BUGGY = """
from backdoorscan import hookimpl
from backdoorscan.plugin.reporter import Reporter

class Buggy(Reporter):
    id = "buggy"
    summary = "Fails."
    def render(self, report, terminal):
        raise RuntimeError("out of tea")

@hookimpl
def backdoorscan_reporters():
    return [Buggy]
"""


def test_a_bug_does_not_look_like_a_verdict(here: Path, cli: Cli, third_party: Callable[..., Any]) -> None:
    third_party(BUGGY)
    result = cli(*SCAN.split(), "--limit", 40, "-f", "buggy")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "out of tea" in result.err


def test_repair_that_leaves_the_backdoor_in(here: Path, cli: Cli) -> None:
    command = "repair model.h5 --valid clean.h5 --poisoned poisoned.h5 --channels 1 -o out -f json --no-rescan"
    result = cli(*command.split())
    assert result.code == ExitCode.FOUND
    assert all(row["attack_success_rate"] > 0.5 for row in result.json["candidates"])


def test_repair_that_breaks_its_budget(here: Path, cli: Cli) -> None:
    command = "repair model.h5 --valid clean.h5 --poisoned poisoned.h5 --drop 10 --no-rescan -f json --max-drop "
    codes = {}
    for points, within in ((0, False), (100, True)):
        result = cli(*command.split(), points, "-o", f"out{points}")
        codes[points] = result.code
        assert [row["within_budget"] for row in result.json["candidates"]] == [within, within]
    assert codes == {0: ExitCode.FOUND, 100: ExitCode.OK}


def test_repair_that_removes_the_backdoor(repaired: Any) -> None:
    assert repaired.code == ExitCode.OK


def interrupt(command: str, ready: Callable[[int], bool], env: dict[str, str]) -> tuple[int, str, str]:
    """Start a command, wait until it is ``ready``, given its process id, and press Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "backdoorscan", *command.split()],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        patience = time.monotonic() + 60
        while not ready(process.pid):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < patience, "it never got there"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    # Python may also end itself with the signal, which a shell reports as 130 too.
    code = ExitCode.INTERRUPTED if process.returncode == -signal.SIGINT else process.returncode
    return code, out, err


STARTED = """
from pathlib import Path
from backdoorscan import hookimpl

@hookimpl
def backdoorscan_scan_started():
    Path("started").touch()
"""


def test_interrupted_scan(here: Path, third_party: Callable[..., Any]) -> None:
    before = contents(here)
    endless = "-O neural-cleanse.steps=1000000 -O neural-cleanse.early_stop_patience=1000000"
    code, out, err = interrupt(
        f"{SCAN} {endless} -f json -o report.json",
        lambda _: (here / "started").exists(),
        third_party(STARTED).env,
    )
    (here / "started").unlink()
    assert (code, out) == (ExitCode.INTERRUPTED, "")
    assert err == "backdoorscan: Interrupted.\n  The same command with --resume goes on where it ended.\n"
    assert contents(here) == before


def test_interrupted_repair_leaves_nothing_half_written(here: Path) -> None:
    before = contents(here)
    code, out, err = interrupt(
        "repair model.h5 --valid clean.h5 --channels 1 --channels 2 --channels 3 --channels 4 -o out",
        lambda pid: any((here / f".out.{pid}.tmp").glob("*.h5")),
        {},
    )
    assert (code, out, err) == (ExitCode.INTERRUPTED, "", "backdoorscan: Interrupted.\n")
    assert contents(here) == before
    assert not [path for path in here.iterdir() if path.name.startswith((".", "out"))]
