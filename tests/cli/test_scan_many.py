"""``backdoorscan scan`` of several models."""

from __future__ import annotations

import json
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

import pytest

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]

SAYING = """
import os
from dataclasses import dataclass
from pathlib import Path
from backdoorscan import hookimpl
from backdoorscan.findings import Evidence, Finding, Judgement
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import option

@dataclass(frozen=True, kw_only=True)
class Saying(Detector):
    "Says what the environment says of a model with so many weights near 0."
    id = "saying"

    def examine(self, unit, classifier, images, context):
        with open("examined", "a") as file:
            file.write(f"{os.getpid()}\\n")
        while Path("wait").exists():
            context.progress(0.5)
        weight = float(list(classifier.parameters())[0].detach().flatten()[0])
        return Evidence(figures={"weight": weight}, gradient_samples=1)

    def judge(self, evidence):
        p_value = float(os.environ.get(f"P_{evidence[0].figures['weight']:.4f}", 1.0))
        return Judgement(findings=[Finding(target_label=3, p_value=p_value, score=1.0)], p_value=p_value)

@hookimpl
def backdoorscan_detectors():
    return [Saying]
"""


@pytest.fixture
def models(
    demo: DemoFiles, elsewhere: Path, third_party: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """``models(bad=0.001, good=1.0)``: files in a folder ``m`` of which the detector ``saying`` says so."""
    import h5py
    import numpy as np

    third_party(SAYING)

    def make(**p_values: float) -> None:
        (elsewhere / "m").mkdir(exist_ok=True)
        for number, (name, p_value) in enumerate(p_values.items(), start=1):
            file = elsewhere / "m" / f"{name}.h5"
            shutil.copy(demo.model, file)
            first = number / 1000
            with h5py.File(file, "r+") as content:
                kernels: list[Any] = []
                content["model_weights"].visititems(
                    lambda path, item, kernels=kernels: kernels.append(item) if path.endswith("kernel:0") else None
                )
                for kernel in kernels:
                    values = kernel[()]
                    values.flat[0] = np.float32(first)
                    kernel[...] = values
            monkeypatch.setenv(f"P_{first:.4f}", str(p_value))

    return make


@pytest.fixture
def scan(cli: Cli, demo: DemoFiles) -> Cli:
    return lambda *arguments: cli("scan", *arguments, "--valid", demo.clean, "-d", "saying", "--jobs", 1)


def test_one_table_details_of_those_not_clean_and_one_exit_code(models: Any, scan: Cli) -> None:
    models(bad=0.0005, fine=1.0, odd=0.02)
    result = scan("m")
    assert result.code == ExitCode.FOUND
    lines = result.out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert [name.removeprefix("m/") for name in rows] == ["bad.h5", "fine.h5", "odd.h5"]
    assert rows["m/bad.h5"][:3] == ["BACKDOORED", "1", "high"]
    assert rows["m/fine.h5"][0] == "CLEAN"
    assert rows["m/odd.h5"][:3] == ["INCONCLUSIVE", "1", "low"]
    assert [line for line in lines[6:] if line.startswith("m/")] == ["m/bad.h5  BACKDOORED", "m/odd.h5  INCONCLUSIVE"]
    assert result.err.startswith("next: backdoorscan repair m/bad.h5 ") and result.err.count("\n") == 1
    again = scan("m/fine.h5", "m")
    assert [line.split()[-1] for line in again.out.splitlines()[3:6]] == ["cached"] * 3
    assert again.out.splitlines()[3].startswith(" m/fine.h5")


def test_one_report_with_a_run_for_each(
    models: Any, scan: Cli, validate: Callable[[Any], None], elsewhere: Path
) -> None:
    models(fine=1.0, bad=0.02)
    (elsewhere / "m" / "cut.h5").write_bytes((elsewhere / "m" / "fine.h5").read_bytes()[:2000])
    result = scan("m/fine.h5", "m/cut.h5", "m/bad.h5", "m/none.h5", "-f", "json")
    assert result.code == ExitCode.ERROR
    report = result.json
    validate(report)
    assert [(run["verdict"], run["complete"], bool(run["error"])) for run in report["runs"]] == [
        ("clean", True, False),
        ("inconclusive", False, True),
        ("inconclusive", True, False),
        ("inconclusive", False, True),
    ]
    assert [len(run["model"]["sha256"] or "") for run in report["runs"]] == [64, 64, 64, 0]
    assert report["complete"] is False
    told = result.err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["not scanned", "not scanned"]
    models(bad=0.0, fine=1.0)
    proven = scan("m", "--no-cache")
    assert proven.code == ExitCode.FOUND
    assert "NOT SCANNED" in proven.out


def test_every_format_has_a_place_for_a_model_that_could_not_be_scanned(
    models: Any, scan: Cli, elsewhere: Path
) -> None:
    models(fine=1.0, bad=0.0)
    (elsewhere / "m" / "<b>cut.h5").write_bytes((elsewhere / "m" / "fine.h5").read_bytes()[:2000])
    formats = ["html", "json", "sarif", "junit", "markdown", "cyclonedx"]
    result = scan("m", *(part for name in formats for part in ("-f", f"{name}=out.{name}")))
    assert result.code == ExitCode.FOUND, result.err
    for name in formats:
        assert "cut.h5" in (elsewhere / f"out.{name}").read_text()


def test_a_manifest(models: Any, scan: Cli, elsewhere: Path) -> None:
    models(fine=1.0, bad=0.0005, lax=0.02)
    (elsewhere / "m" / "models.toml").write_text(
        '[[model]]\nfile = "bad.h5"\nfail_on = "critical"\nname = "known"\n'
        '[[model]]\nfile = "lax.h5"\nalpha = 0.5\nfail_on = "never"\ninput_range = [0, 1]\n'
    )
    result = scan("m/fine.h5", "--manifest", "m/models.toml", "-f", "json")
    assert result.code == ExitCode.OK
    assert [run["verdict"] for run in result.json["runs"]] == ["clean", "backdoored", "backdoored"]
    assert [run["alpha"] for run in result.json["runs"]] == [None, None, 0.5]
    assert [run["model"].get("name") for run in result.json["runs"]] == [None, "known", None]
    assert result.json["runs"][2]["model"]["input_range_found"] is False
    assert " known " in scan("--manifest", "m/models.toml").out
    (elsewhere / "one.toml").write_text('[[model]]\nfile = "m/bad.h5"\nname = "only"\nvalid = "none.h5"\n')
    alone = scan("--manifest", "one.toml")
    assert alone.code == ExitCode.ERROR
    alone.assert_one_message()
    assert "none.h5" in alone.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "There is no model to scan"),
        (["nothing"], "no model file in nothing"),
        (["--manifest", "none.toml"], "none.toml"),
        (["a.h5", "b.h5", "--save-triggers", "t.npz"], "--save-triggers is of use only with one model"),
        (["a.h5", "--fail-on", "hihg"], "Did you mean 'high'"),
        (["a.h5", "b.h5", "--baseline", "none.toml"], "none.toml"),
    ],
)
def test_usage(arguments: list[str], says: str, cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "nothing").mkdir()
    result = cli("scan", *arguments)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert says in result.err


def test_images_that_all_need_and_nobody_can_read_are_an_error_before_any_work(models: Any, cli: Cli) -> None:
    models(fine=1.0, bad=0.0)
    result = cli("scan", "m", "--valid", "none.h5", "-d", "saying")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()


def test_ctrl_c_and_resume_across_processes(models: Any, scan: Cli, cli: Cli, demo: DemoFiles, elsewhere: Path) -> None:
    models(one=1.0, two=1.0, three=1.0)
    command = ["scan", "m", "--valid", str(demo.clean), "-d", "saying", "--jobs", "2", "-f", "json"]
    assert scan("m/one.h5").code == ExitCode.OK
    (elsewhere / "wait").touch()
    (elsewhere / "examined").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "backdoorscan", *command],
        env={**os.environ, "PYTHONPATH": sys.path[0]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def working() -> list[int]:
        return [int(line) for line in (elsewhere / "examined").read_text().split()] if Path("examined").exists() else []

    try:
        patience = time.monotonic() + 90
        while len(working()) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < patience, "it never got there"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (ExitCode.INTERRUPTED, "")
    assert err == "backdoorscan: Interrupted.\n  The same command with --resume goes on where it ended.\n"
    for child in set(working()):
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    (elsewhere / "wait").unlink()
    again = cli(*command, "--resume")
    assert again.code == ExitCode.OK
    assert [run["cached"] for run in again.json["runs"]] == [True, False, False]
    assert len(re.findall("nothing to resume", again.err)) == 2
    assert json.loads(again.out)["cost"]["gradient_samples"] == 2
