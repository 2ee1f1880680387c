"""``backdoorscan convert``: another format, the same answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnxruntime
import pytest

from backdoorscan.artifact import Artifact
from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode
from backdoorscan.formats.pt2 import plain

Cli = Callable[..., Any]

MANUAL = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_the_new_file_is_as_good(
    suffix: str, demo: DemoFiles, cli: Cli, elsewhere: Path, validate: Callable[[Any], None]
) -> None:
    result = cli("convert", demo.model, f"new.{suffix}", "-f", "json")
    assert (result.code, result.err) == (ExitCode.OK, "")
    report = result.json
    validate(report)
    assert report["difference"] <= report["tolerance"]
    assert (report["layout"], report["pixels"], report["num_classes"]) == ("NHWC", None, 10)
    assert report["model"]["sha256"] == Artifact.read(demo.model).sha256
    files = sorted(Path(file["path"]).name for file in report["files"])
    assert files == sorted(path.name for path in elsewhere.iterdir())
    arch = ("--arch", "new.json") if suffix == "safetensors" else ()
    images = ("--valid", demo.clean, "--poisoned", demo.poisoned, "-f", "json")
    before, after = (
        cli("evaluate", model, *more, *images).json for model, more in ((demo.model, ()), (f"new.{suffix}", arch))
    )
    for figure in ("clean_accuracy", "attack_success_rate"):
        assert before[figure] == after[figure]


def test_pixels_are_found_on_clean_images(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    result = cli("convert", demo.model, "new.onnx", "--pixels", "--valid", demo.clean, "--limit", 200)
    assert (result.code, result.err) == (ExitCode.OK, "")
    assert "[0, 1]" in result.out
    assert "onnxruntime" in result.out
    with h5py.File(demo.test) as file:
        pixels, labels = file["data"][:200], file["label"][:200]
    (scores,) = onnxruntime.InferenceSession("new.onnx").run(None, {"input": pixels.astype(np.float32) / 255})
    assert (scores.argmax(1) == labels).mean() > 0.8
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("new.tflite",), "does not tell"),
        (("new.onnx", "--to", "onx"), "Did you mean 'onnx'?"),
        (("none/new.onnx",), "no folder"),
        (("new.onnx", "--input-range", "0,255"), "--pixels"),
        (("new.onnx", "--pixels"), "--input-range"),
        (("new.onnx", "-f", "html"), "format"),
        (("there.onnx",), "--force"),
    ],
)
def test_what_cannot_be_done(
    arguments: tuple[str, ...], words: str, demo: DemoFiles, cli: Cli, elsewhere: Path
) -> None:
    (elsewhere / "there.onnx").write_bytes(b"mine")
    result = cli("convert", demo.model, *arguments)
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert words in result.err
    assert [path.read_bytes() for path in elsewhere.iterdir()] == [b"mine"]


def test_never_over_the_model(demo: DemoFiles, cli: Cli) -> None:
    before = demo.model.read_bytes()
    result = cli("convert", demo.model, demo.model, "--to", "onnx", "--force")
    assert result.code == ExitCode.ERROR
    assert "is the model itself" in result.err
    assert demo.model.read_bytes() == before


def test_the_graph_of_the_manual_can_be_read() -> None:
    (example,) = re.findall(r"^```json\n(.*?)^```$", MANUAL, re.DOTALL | re.MULTILINE)
    graph = plain.parse(example.encode(), "the manual")
    assert graph.shapes == {"fc.weight": (10, 784), "fc.bias": (10,)}
