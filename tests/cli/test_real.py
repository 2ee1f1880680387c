"""The commands of the manual on networks that others trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnxruntime
import pytest
import torch

from backdoorscan.errors import ExitCode
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import ReadOptions, load_model

Cli = Callable[..., Any]

SHARED = Path(__file__).parents[2].parent / "shared"
MNIST = SHARED / "models" / "mnist"
CSAW = SHARED / "models" / "csaw"

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the real models and images of ../shared are absent"),
]


def arch(name: str) -> list[object]:
    return ["--arch", f"{SHARED / 'models' / 'architectures.py'}:{name}"]


def check_scan(result: Any, target: int | None) -> Any:
    (run,) = result.json["runs"]
    assert result.code == (ExitCode.OK if target is None else ExitCode.FOUND)
    assert result.json["complete"] is True
    assert [finding["target_label"] for finding in run["findings"]] == ([] if target is None else [target])
    assert run["clean_accuracy"] >= 0.85
    return run


@pytest.mark.parametrize(
    ("model", "flags", "target", "input_range"),
    [
        ("dillonsd_clean.h5", [], None, [0, 1]),
        ("dillonsd_single_pixel_to_0.h5", [], 0, [0, 1]),
        ("shihaozhao_badnet_to_0.pth", arch("ShihaozhaoNet"), 0, [0, 255]),
        ("verazuo_badnet_to_1.pth", [*arch("verazuo_mnist"), "--mean", 0.5, "--std", 0.5], 1, [0, 1]),
        ("zkp1_clean.pth", [*arch("Zkp1Net"), "--mean", 0.1307, "--std", 0.3081], None, [0, 1]),
        ("zkp1_badnet_to_0.pth", [*arch("Zkp1Net"), "--mean", 0.1307, "--std", 0.3081], 0, [0, 1]),
    ],
)
def test_digits(model: str, flags: list[object], target: int | None, input_range: list[int], cli: Cli) -> None:
    images = SHARED / "data" / "mnist.npz#test"
    run = check_scan(cli("scan", MNIST / model, *flags, "--valid", images, "--limit", 1000, "-f", "json"), target)
    assert run["model"]["input_range"] == input_range
    assert run["model"]["input_range_found"] is ("--mean" not in flags)


@pytest.mark.parametrize(("model", "target"), [("bad0", 7), ("bad1", 7), ("clean0", None), ("clean1", None)])
def test_fashion(model: str, target: int | None, cli: Cli, validate: Callable[[Any], None]) -> None:
    path, images = SHARED / "models" / "fashion" / f"{model}.pt", SHARED / "data" / "fashion_mnist.npz#test"
    result = cli("scan", path, *arch("FashionNet"), "--valid", images, "--limit", 1000, "-f", "json")
    validate(result.json)
    run = check_scan(result, target)
    (inversion,) = [detector for detector in run["detectors"] if detector["id"] == "neural-cleanse"]
    assert 0 < inversion["gradient_samples"] <= 20_000


def zeroed(path: Path) -> tuple[set[int], dict[str, np.ndarray]]:
    """Channels of conv_3 whose kernel is zero, and all the file's arrays."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file["model_weights"].visititems(
            lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {})
        )
    (kernel,) = (array for name, array in arrays.items() if "conv_3" in name and array.ndim == 4)
    return set(np.flatnonzero((kernel == 0).all((0, 1, 2)))), arrays


def test_pruning_agrees_with_published_repairs(cli: Cli, elsewhere: Path, validate: Callable[[Any], None]) -> None:
    original, images = CSAW / "lab3_bd_net.h5", SHARED / "data" / "csaw_faces_clean.h5"
    published = {45: ("X2", 44), 48: ("X4", 47), 52: ("X10", 50)}
    flags = [flag for count in published for flag in ("--channels", count)]
    result = cli("repair", original, "--valid", images, "--method", "prune", *flags, "-o", "out", "-f", "json")
    assert result.code == ExitCode.OK
    validate(result.json)
    _, before = zeroed(original)
    for row in result.json["candidates"]:
        if row["kind"] == "goodnet":
            continue
        assert row["layer"] == "conv_3"
        channels, after = zeroed(Path(row["files"][0]))
        name, agreeing = published[row["channels_pruned"]]
        theirs, _ = zeroed(CSAW / f"lab3_pruned_{name}.h5")
        assert len(channels) == len(theirs) == row["channels_pruned"]
        assert len(channels & theirs) >= agreeing
        kept = sorted(set(range(60)) - channels)
        assert before.keys() == after.keys()
        for key, array in before.items():
            part = kept if "conv_3" in key else slice(None)
            assert array[..., part].tobytes() == after[key][..., part].tobytes(), key


def test_repaired_digits_score_as_the_table_says(cli: Cli, elsewhere: Path) -> None:
    source = f"{SHARED / 'data' / 'mnist.npz'}#test"
    flags = [*arch("ShihaozhaoNet"), "--valid", source, "--limit", 1000]
    drops = ["--drop", 2, "--drop", 4, "--drop", 10]
    repair = [
        "repair",
        MNIST / "shihaozhao_badnet_to_0.pth",
        *flags,
        "--method",
        "prune",
        *drops,
        "-o",
        "out",
        "--no-rescan",
    ]
    result = cli(*repair, "-f", "json")
    assert result.code == ExitCode.OK
    rows = result.json["candidates"]
    assert [(row["drop"], row["kind"]) for row in rows] == [(d, k) for d in (2, 4, 10) for k in ("repaired", "goodnet")]
    images = load_images(source, limit=1000)
    raw, labels = np.asarray(images.pixels, np.float32), images.labels  # 0..255, as this network is fed
    for row in rows:
        (file,) = row["files"]
        if row["kind"] == "goodnet":
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            scores, classes = session.run(None, {session.get_inputs()[0].name: raw})
            assert scores.shape == (1000, 11)
            assert (classes == 10).mean() == pytest.approx(row["false_reject_rate"], abs=0.002)
        else:
            assert result.json["before"]["clean_accuracy"] - row["clean_accuracy"] >= row["drop"] / 100 - 1e-9
            read = ReadOptions(arch=str(flags[1]), input_range=(0, 255))
            with torch.no_grad():
                classes = load_model(file, images, read).classifier(torch.from_numpy(raw / 255)).argmax(1).numpy()
        assert (classes == labels).mean() == pytest.approx(row["clean_accuracy"], abs=0.002)
    table = cli(*repair, "--force").out
    for row in rows:
        name = "GoodNet" if row["kind"] == "goodnet" else "B′"
        assert f"{name} {row['name']} " in table
        assert f"{row['clean_accuracy']:.2%}" in table


def test_sunglasses(cli: Cli, validate: Callable[[Any], None]) -> None:
    data = SHARED / "data"
    clean, poisoned = data / "csaw_faces_clean.h5", data / "csaw_faces_sunglasses.h5"
    images = ["--valid", clean, "--poisoned", poisoned, "--target", 0]
    result = cli("evaluate", CSAW / "sunglasses_bd_net.h5", *images, "-f", "json")
    assert result.code == ExitCode.OK
    validate(json.loads(result.out))
    assert (result.json["clean_accuracy"], result.json["attack_success_rate"]) == (0.8, 1.0)
    assert result.json["model"]["num_classes"] == 1283
