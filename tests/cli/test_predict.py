"""``backdoorscan predict``: the class of a picture, or "N (backdoored)"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from backdoorscan.demo import DemoFiles
from backdoorscan.errors import ExitCode

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def goodnet(candidates: Any) -> str:
    return str(candidates["X=4", "goodnet"]["files"][0])


def save_pictures(source: Path, folder: Path, count: int, form: str = "png") -> tuple[list[str], np.ndarray]:
    """The first images of a file as pictures, and their labels."""
    with h5py.File(source) as file:
        pixels, labels = file["data"][:count, 0], file["label"][:count].astype(int)
    names = [f"{source.stem}{index}.{form}" for index in range(len(pixels))]
    for name, array in zip(names, pixels, strict=True):
        Image.fromarray(array).save(folder / name)
    return names, labels


def test_a_clean_picture_gets_its_class(goodnet: str, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    names, labels = save_pictures(demo.test, elsewhere, 20)
    results = [cli("predict", goodnet, name) for name in names]
    assert all((result.code, result.err) == (ExitCode.OK, "") for result in results)
    answers = [result.out for result in results]
    assert set(answers) <= {f"{label}\n" for label in range(10)} | {"10 (backdoored)\n"}
    assert sum(answer == f"{label}\n" for answer, label in zip(answers, labels, strict=True)) >= 16


def test_many_pictures_are_named(goodnet: str, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    names, _ = save_pictures(demo.test, elsewhere, 12)
    lines = cli("predict", goodnet, *names).out.splitlines()
    assert lines == [f"{name}: {cli('predict', goodnet, name).out.strip()}" for name in names]


def test_poisoned_pictures_are_rejected(goodnet: str, demo: DemoFiles, program: Cli, elsewhere: Path) -> None:
    names, _ = save_pictures(demo.poisoned, elsewhere, 30)
    result = program("predict", goodnet, *names)
    assert (result.code, result.err) == (ExitCode.OK, "")
    assert sum(line.endswith(": 10 (backdoored)") for line in result.out.splitlines()) >= 28


def test_colour_pictures_of_a_grey_network(goodnet: str, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    names, _ = save_pictures(demo.test, elsewhere, 1)
    Image.open(names[0]).convert("RGB").save("colour.png")
    assert cli("predict", goodnet, "colour.png").out == cli("predict", goodnet, names[0]).out


def text(folder: Path) -> None:
    (folder / "bad.png").write_text("no picture")


def small(folder: Path) -> None:
    Image.new("L", (8, 8)).save(folder / "bad.png")


def cut(folder: Path) -> None:
    Image.effect_noise((16, 16), 50).save(folder / "bad.png")
    (folder / "bad.png").write_bytes((folder / "bad.png").read_bytes()[:60])


@pytest.mark.parametrize("spoil", [text, small, cut, lambda folder: None, lambda folder: (folder / "bad.png").mkdir()])
def test_bad_picture(spoil: Callable[[Path], object], goodnet: str, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    names, _ = save_pictures(demo.test, elsewhere, 1)
    spoil(elsewhere)
    result = cli("predict", goodnet, names[0], "bad.png")
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "bad.png" in result.err


@pytest.mark.parametrize("length", [0.1, 0.5, 0.99, -1])
def test_truncated_goodnet(length: float, goodnet: str, demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    names, _ = save_pictures(demo.test, elsewhere, 1)
    whole = Path(goodnet).read_bytes()
    (elsewhere / "cut.onnx").write_bytes(whole[: int(length * len(whole)) if length > 0 else int(length)])
    result = cli("predict", "cut.onnx", names[0])
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "cut.onnx" in result.err


def test_a_network_is_no_goodnet(demo: DemoFiles, cli: Cli, elsewhere: Path) -> None:
    names, _ = save_pictures(demo.test, elsewhere, 1)
    result = cli("predict", demo.model, names[0])
    assert result.code == ExitCode.ERROR
    result.assert_one_message()
    assert "repair" in result.err
