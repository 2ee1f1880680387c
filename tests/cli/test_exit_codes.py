"""What a pipeline reads: the verdict as an exit code."""

from __future__ import annotations

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

SCAN = "scan model.h5 --valid clean.h5 "


TWIN = "scan clean_model.h5 --valid clean.h5 "


def test_clean(here: Path, program: Cli) -> None:
    result = program(*(TWIN + "-d neural-cleanse -f json").split())
    assert result.code == ExitCode.OK
    assert result.json["verdict"] == "clean"
    assert result.err == ""


def test_backdoored(here: Path, demo: DemoFiles, program: Cli) -> None:
    result = program(*(SCAN + "-d neural-cleanse -f json").split())
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
    p_value: float | None,
    code: int,
    verdict: str,
    here: Path,
    cli: Cli,
    third_party: Callable[..., Any],
    oracle: Callable[..., str],
) -> None:
    third_party(oracle(p_value=p_value))
    result = cli(*SCAN.split(), "-d", "oracle", "-f", "json")
    assert (result.code, result.json["verdict"]) == (code, verdict)
    assert len(result.json["runs"][0]["findings"]) == (p_value is not None and verdict != "clean")


def test_alpha_moves_the_thresholds(
    here: Path, cli: Cli, third_party: Callable[..., Any], oracle: Callable[..., str]
) -> None:
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
    p_value: float,
    code: int,
    verdict: str,
    here: Path,
    cli: Cli,
    third_party: Callable[..., Any],
    oracle: Callable[..., str],
) -> None:
    third_party(oracle(p_value=p_value), "sages")
    third_party(oracle("failing", examine="raise ValueError('no such layer')"), "bunglers")
    result = cli(*SCAN.split(), "-d", "oracle", "-d", "failing", "-f", "json")
    assert result.code == code
    assert (result.json["verdict"], result.json["complete"]) == (verdict, False)
    errors = {detector["id"]: detector["error"] for detector in result.json["runs"][0]["detectors"]}
    assert errors["oracle"] == ""
    assert "ValueError: no such layer" in errors["failing"]


@pytest.mark.parametrize("part", ["examine", "judge"])
def test_a_failed_detector_alone_gives_no_verdict(
    part: str, here: Path, cli: Cli, third_party: Callable[..., Any], oracle: Callable[..., str]
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
