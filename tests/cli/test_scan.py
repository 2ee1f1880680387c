"""``backdoorscan scan`` as users use it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jsonschema
import numpy as np
import pytest

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]

QUICK = ["-d", "neural-cleanse", "-O", "neural-cleanse.steps=3", "--limit", "60"]
"""Enough for a report, not for an answer."""


def without_times(report: Any) -> Any:
    """A report without what may differ between two runs."""
    if isinstance(report, dict):
        varying = {"cost", "seconds", "path"}
        return {key: without_times(value) for key, value in report.items() if key not in varying}
    return [without_times(value) for value in report] if isinstance(report, list) else report


def test_table(demo: DemoFiles, cli: Cli) -> None:
    result = cli("scan", demo.model, "--valid", demo.clean)
    lines = result.out.splitlines()
    assert result.code == ExitCode.FOUND
    assert lines[0] == f"{demo.model}  BACKDOORED"
    assert "1×16×16 -> 10 classes" in lines[1]
    assert "on 380 images" in lines[2]
    (header,) = (line for line in lines if line.startswith(" target label"))
    row = lines[lines.index(header) + 2].split()
    assert row[:3] == [str(demo.target), "any", "confirmation"]
    assert "not tested" not in result.out
    assert "gradient samples" in lines[-1]
    assert "\x1b" not in result.out
    assert result.err == f"next: backdoorscan repair {demo.model} --valid {demo.clean}\n"


def test_table_of_a_clean_model(demo: DemoFiles, cli: Cli) -> None:
    result = cli("scan", demo.clean_model, "--valid", demo.clean, "-d", "neural-cleanse")
    assert result.code == ExitCode.OK
    assert result.out.startswith(f"{demo.clean_model}  CLEAN\n")
    assert "target label" not in result.out
    assert result.err.startswith("next: ")


@pytest.mark.parametrize(("color", "colored"), [("always", True), ("never", False), ("auto", False)])
def test_color(color: str, colored: bool, demo: DemoFiles, cli: Cli) -> None:
    result = cli("--color", color, "scan", demo.model, "--valid", demo.clean, *QUICK)
    assert ("\x1b[" in result.out) is colored


def test_json_fits_its_schema(scanned: Any, validate: Callable[[Any], None]) -> None:
    assert scanned.json["schema"] == "backdoorscan.report/1"
    validate(scanned.json)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.update(verdict="fine"),
        lambda report: report.update(schema="backdoorscan.repair/1"),
        lambda report: report.update(surprise=1),
        lambda report: report.pop("versions"),
        lambda report: report["cost"].update(gradient_samples=1.5),
        lambda report: report["runs"].clear(),
        lambda report: report["runs"][0].update(clean_accuracy=98.2),
        lambda report: report["runs"][0].update(verdict="clean"),
        lambda report: report["runs"][0]["findings"].clear(),
        lambda report: report["runs"][0]["model"].pop("sha256"),
        lambda report: report["runs"][0]["images"].update(count="380"),
        lambda report: report["runs"][0]["images"].pop("sample"),
        lambda report: report["runs"][0]["findings"][0].update(p_value=1.5),
        lambda report: report["runs"][0]["findings"][0].update(target_label=-1),
        lambda report: report["runs"][0]["findings"][0]["trigger"].pop("l1"),
        lambda report: report["runs"][0]["detectors"][0].update(error=None),
    ],
)
def test_schema_refuses_what_is_no_report(
    spoil: Callable[[Any], object], scanned: Any, validate: Callable[[Any], None]
) -> None:
    report = copy.deepcopy(scanned.json)
    report["verdict"] = report["runs"][0]["verdict"] = "backdoored"
    validate(report)
    spoil(report)
    with pytest.raises(jsonschema.ValidationError):
        validate(report)


def test_json_says_what_was_scanned_and_what_was_found(scanned: Any, demo: DemoFiles) -> None:
    report = scanned.json
    (run,) = report["runs"]
    assert report["verdict"] == run["verdict"] == "backdoored"
    assert report["complete"] is run["complete"] is True
    assert (report["seed"], report["alpha"]) == (0, 0.01)
    assert run["model"]["path"] == str(demo.model)
    assert run["model"]["sha256"] == hashlib.sha256(demo.model.read_bytes()).hexdigest()
    assert run["model"]["format"] == "keras-h5"
    assert (run["model"]["input_shape"], run["model"]["num_classes"]) == ([1, 16, 16], 10)
    assert (run["model"]["input_range"], run["model"]["layout"]) == ([0, 1], "NHWC")
    assert run["model"]["input_range_found"] is True
    assert (run["images"]["path"], run["images"]["count"]) == (str(demo.clean), 380)
    assert run["clean_accuracy"] == pytest.approx(demo.accuracy, abs=0.03)
    (finding,) = run["findings"]
    assert (finding["target_label"], finding["source_label"]) == (demo.target, None)
    assert finding["p_value"] <= report["alpha"]
    (detector,) = run["detectors"]
    assert (detector["id"], detector["error"], detector["p_value"]) == ("neural-cleanse", "", finding["p_value"])
    labels = [row["label"] for unit in detector["evidence"]["units"] for row in unit["labels"]]
    assert labels == list(range(10))
    samples = report["cost"]["gradient_samples"]
    assert 0 < samples == run["cost"]["gradient_samples"] == detector["gradient_samples"] <= 20_000


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """As docs/report.md says."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["float32"])), "<f4").reshape(packed["shape"])


def test_triggers_can_be_unpacked(scanned: Any, demo: DemoFiles) -> None:
    (run,) = scanned.json["runs"]
    found = run["findings"][0]["trigger"]
    reversed_ones = run["detectors"][0]["triggers"]
    assert sorted(trigger["target"] for trigger in reversed_ones) == list(range(10))
    assert [trigger["l1"] for trigger in reversed_ones] == sorted(trigger["l1"] for trigger in reversed_ones)
    assert reversed_ones[0] == {key: value for key, value in found.items() if key != "attack_success_rate"}
    for trigger in [found, *reversed_ones]:
        mask, pattern = unpack(trigger["mask"]), unpack(trigger["pattern"])
        assert (mask.shape, pattern.shape) == ((1, 16, 16), (1, 16, 16))
        assert 0 <= min(mask.min(), pattern.min()) <= max(mask.max(), pattern.max()) <= 1
        assert trigger["l1"] == pytest.approx(mask.sum(), rel=1e-5)
        assert trigger["area"] == pytest.approx(mask.mean(), rel=1e-5)


def test_the_trigger_works(scanned: Any, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    """What the report calls a trigger does, stamped by hand, send other classes to the target label."""
    trigger = scanned.json["runs"][0]["findings"][0]["trigger"]
    mask, pattern = unpack(trigger["mask"]), unpack(trigger["pattern"])
    with h5py.File(demo.test) as test, h5py.File("stamped.h5", "w") as file:
        others = test["label"][()] != demo.target
        images = test["data"][()][others] / np.float32(255)
        file["data"], file["label"] = (1 - mask) * images + mask * pattern, np.full(len(images), demo.target)
    report = cli("evaluate", demo.model, "--valid", demo.test, "--poisoned", "stamped.h5", "-f", "json").json
    assert report["attack_success_rate"] == pytest.approx(trigger["attack_success_rate"], abs=0.1)


def test_report_to_a_file_is_the_same_report(
    scanned: Any, demo: DemoFiles, program: Cli, elsewhere: Path, validate: Callable[[Any], None]
) -> None:
    command = ["scan", demo.model, "--valid", demo.clean, "-d", "neural-cleanse"]
    command += ["--no-cache", "-f", "json", "-o", "report.json"]
    (elsewhere / "report.json").write_text("of an earlier run")
    result = program(*command)  # where it runs does not matter either
    assert (result.code, result.out, result.err) == (scanned.code, "", "wrote report.json\n")
    report = json.loads((elsewhere / "report.json").read_text())
    validate(report)
    assert without_times(report) == without_times(scanned.json)
    assert [path.name for path in elsewhere.iterdir()] == ["report.json"]


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_says_nothing_but_the_report(flag: str, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    table = cli(flag, "scan", demo.model, "--valid", demo.clean, *QUICK)
    assert table.out.startswith(str(demo.model))
    assert table.err == ""
    assert cli(flag, "scan", demo.model, "--valid", demo.clean, *QUICK, "--no-cache", "-o", "report.txt").err == ""
    assert (elsewhere / "report.txt").read_text().startswith(str(demo.model))


def test_page_to_a_file(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    result = cli("scan", demo.model, "--valid", demo.clean, *QUICK, "-f", "html", "-o", "report.html")
    assert (result.out, result.err) == ("", "wrote report.html\n")
    page = (elsewhere / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert demo.model.name in page
    assert [path.name for path in elsewhere.iterdir()] == ["report.html"]


def test_figures_to_a_folder(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    result = cli("scan", demo.model, "--valid", demo.clean, *QUICK, "-f", "json", "--save-figures", "figures")
    assert result.json["schema"] == "backdoorscan.report/1"
    pictures = list((elsewhere / "figures").iterdir())
    assert result.err == f"wrote {len(pictures)} pictures to figures\n"
    assert pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_few_of_the_images_are_in_the_report(scanned: Any, demo: DemoFiles) -> None:
    with h5py.File(demo.clean) as file:
        known = {image.tobytes() for image in file["data"][()]}
    sample = scanned.json["runs"][0]["images"]["sample"]
    assert len(sample) == 4
    assert all(image["shape"] == [1, 16, 16] for image in sample)
    assert {zlib.decompress(base64.b64decode(image["uint8"])) for image in sample} <= known


def test_dash_is_stdout(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    result = cli("scan", demo.model, "--valid", demo.clean, *QUICK, "-f", "json", "-o", "-")
    assert result.json["schema"] == "backdoorscan.report/1"
    assert list(elsewhere.iterdir()) == []


def test_seed_decides_the_report(demo: DemoFiles, cli: Cli) -> None:
    def scan(seed: int) -> Any:
        return cli("scan", demo.model, "--valid", demo.clean, *QUICK, "--no-cache", "-f", "json", "--seed", seed).json

    first, second, other = scan(5), scan(5), scan(6)
    assert without_times(first) == without_times(second)
    assert first["cost"]["gradient_samples"] == second["cost"]["gradient_samples"]
    first["seed"] = 6
    assert without_times(first) != without_times(other)


def test_path_does_not_matter(scanned: Any, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    (elsewhere / "m").write_bytes(demo.model.read_bytes())
    (elsewhere / "c").write_bytes(demo.clean.read_bytes())
    result = cli("scan", "m", "--valid", "c", "-d", "neural-cleanse", "-f", "json")
    assert without_times(result.json) == without_times(scanned.json)


def test_labels_left_out_are_said_to_be_not_tested(demo: DemoFiles, cli: Cli) -> None:
    command = ["scan", demo.model, "--valid", demo.clean, *QUICK, "--labels", "2-4, 7"]
    report = cli(*command, "-f", "json").json
    (run,) = report["runs"]
    (inversion,) = [detector for detector in run["detectors"] if detector["id"] == "neural-cleanse"]
    labels = [row["label"] for unit in inversion["evidence"]["units"] for row in unit["labels"]]
    assert labels == [2, 3, 4, 7]
    assert "6 labels left out by --labels" in run["not_tested"]
    assert "6 labels left out by --labels" in " ".join(cli(*command).out.split())


def test_all_labels_leave_none_out(demo: DemoFiles, cli: Cli) -> None:
    report = cli("scan", demo.model, "--valid", demo.clean, *QUICK, "--labels", "0-9", "-f", "json").json
    assert not any("left out" in line for line in report["runs"][0]["not_tested"])


@pytest.mark.parametrize(
    ("flags", "input_range", "mean"),
    [
        (["--input-range", "0,255"], [0, 255], []),
        (["--input-range", "0..255"], [0, 255], []),
        (["--mean", "0.1", "--std", "0.9"], [0, 1], [0.1]),
    ],
)
def test_feeding_can_be_pinned(
    flags: list[str], input_range: list[int], mean: list[float], demo: DemoFiles, cli: Cli
) -> None:
    model = cli("scan", demo.model, "--valid", demo.clean, *QUICK, *flags, "-f", "json").json["runs"][0]["model"]
    assert (model["input_range"], model["mean"], model["input_range_found"]) == (input_range, mean, False)


def test_limit_takes_a_balanced_sample(demo: DemoFiles, cli: Cli) -> None:
    report = cli("scan", demo.model, "--valid", demo.clean, *QUICK, "-f", "json").json
    assert report["runs"][0]["images"]["count"] == 60


# Settings: command line > environment > file > default.

SETTINGS = """
[tool.backdoorscan]
alpha = 0.2
seed = 3
detectors = ["neural-cleanse"]

[tool.backdoorscan.neural-cleanse]
steps = 4
batch_size = 2

[tool.backdoorscan.prune]
drop = [7]
"""


def settings_in_force(report: Any) -> tuple[float, int, int, int]:
    options = report["runs"][0]["detectors"][0]["options"]
    return report["alpha"], report["seed"], options["steps"], options["batch_size"]


@pytest.fixture
def scan(demo: DemoFiles, cli: Cli) -> Cli:
    def start(*arguments: object, before: tuple[str, ...] = ()) -> tuple[float, int, int, int]:
        command = ["scan", demo.model, "--valid", demo.clean, "-d", "neural-cleanse", "--limit", 60, "-f", "json"]
        return settings_in_force(cli(*before, *command, *arguments).json)

    return start


def test_settings_come_from_the_nearest_pyproject(scan: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "pyproject.toml").write_text(SETTINGS)
    assert scan() == (0.2, 3, 4, 2)
    (elsewhere / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(elsewhere / "a" / "b")
    assert scan() == (0.2, 3, 4, 2)
    (elsewhere / "a" / "pyproject.toml").write_text("[tool.backdoorscan]\nseed = 4\nneural-cleanse = {steps = 5}\n")
    assert scan() == (0.01, 4, 5, 5)


def test_environment_comes_before_the_file(scan: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "pyproject.toml").write_text(SETTINGS)
    monkeypatch.setenv("BACKDOORSCAN_SEED", "8")
    monkeypatch.setenv("BACKDOORSCAN_ALPHA", "0.3")
    assert scan() == (0.3, 8, 4, 2)


def test_command_line_comes_first(scan: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "pyproject.toml").write_text(SETTINGS)
    monkeypatch.setenv("BACKDOORSCAN_SEED", "8")
    monkeypatch.setenv("BACKDOORSCAN_ALPHA", "0.3")
    given = ("--seed", 0, "--alpha", 0.5, "-O", "neural-cleanse.steps=6", "-O", "neural-cleanse.batch-size=3")
    assert scan(*given) == (0.5, 0, 6, 3)


def test_config_replaces_the_nearest_pyproject(scan: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "pyproject.toml").write_text(SETTINGS)
    (elsewhere / "strict.toml").write_text("alpha = 0.001\n[neural-cleanse]\nsteps = 2\n")
    assert scan(before=("--config", "strict.toml")) == (0.001, 0, 2, 5)
    monkeypatch.setenv("BACKDOORSCAN_CONFIG", "strict.toml")
    assert scan() == (0.001, 0, 2, 5)
    assert scan(before=("--config", "pyproject.toml")) == (0.2, 3, 4, 2)


@pytest.mark.parametrize(("name", "value"), [("SEED", "one"), ("ALPHA", "low"), ("THREADS", "0"), ("COLOR", "blue")])
def test_environment_that_cannot_be(
    name: str, value: str, demo: DemoFiles, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"BACKDOORSCAN_{name}", value)
    result = cli("scan", demo.model, "--valid", demo.clean, *QUICK)
    assert (result.code, result.out) == (ExitCode.ERROR, "")
    assert f"BACKDOORSCAN_{name}" in result.err


def test_events_reach_plugins_and_their_failure_is_an_error(
    demo: DemoFiles, cli: Cli, third_party: Callable[..., Any], elsewhere: Path
) -> None:
    third_party(
        "from pathlib import Path\n"
        "from backdoorscan import hookimpl\n"
        "@hookimpl\n"
        "def backdoorscan_scan_finished(report):\n"
        "    Path('verdict').touch(exist_ok=False)\n"
        "    Path('verdict').write_text(report.verdict)\n"
    )
    command = ["-q", "scan", demo.model, "--valid", demo.clean, *QUICK, "-f", "json"]
    result = cli(*command)
    assert (elsewhere / "verdict").read_text() == result.json["verdict"]
    again = cli(*command)  # the file exists already
    assert again.code == ExitCode.ERROR
    again.assert_one_message()
    assert "failed on scan_finished" in again.err
