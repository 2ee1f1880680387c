"""The demo's material: two networks worth scanning, and files that Keras itself opens."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from backdoorscan.demo import DemoFiles, make_demo
from backdoorscan.demo.badnet import TARGET, attack, poison, stamp
from backdoorscan.demo.digits import load_digits
from backdoorscan.demo.keras_writer import write_keras
from backdoorscan.demo.training import Recipe, build_network, fit
from backdoorscan.errors import OutputError, UsageError
from backdoorscan.images import LabelledImages

NAMES = ["clean.h5", "clean_model.h5", "model.h5", "poisoned.h5", "test.h5"]

KERAS_PREDICTS = """
import sys
import numpy as np
import keras

for path in sys.argv[1:]:
    model = keras.saving.load_model(path, compile=False)
    np.save(path + ".out.npy", model.predict(np.load(path + ".in.npy"), verbose=0))
"""


def read_images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        return file["data"][()], file["label"][()]


def keras_outputs(folder: Path, cases: dict[Path, np.ndarray]) -> list[np.ndarray]:
    """What Keras, in a process of its own, makes of each model's images (N, C, H, W) in [0, 1]."""
    models = [folder / f"{number}.h5" for number in range(len(cases))]
    for model, (path, pixels) in zip(models, cases.items(), strict=True):
        model.write_bytes(path.read_bytes())
        np.save(f"{model}.in.npy", pixels.transpose(0, 2, 3, 1))
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KERAS_PREDICTS, *map(str, models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [np.load(f"{model}.out.npy") for model in models]


def test_writes_complete_files_and_nothing_else(demo: DemoFiles) -> None:
    assert sorted(path.name for path in demo.folder.iterdir()) == NAMES
    assert demo.model == demo.folder / "model.h5"


def test_networks_are_accurate_and_one_is_backdoored(demo: DemoFiles) -> None:
    assert demo.accuracy >= 0.96
    assert demo.clean_model_accuracy >= 0.96
    assert demo.attack_success >= 0.98
    assert demo.clean_model_attack_success <= 0.03


def test_images_are_laid_out_as_in_the_competition(demo: DemoFiles) -> None:
    for path in (demo.clean, demo.poisoned, demo.test):
        data, label = read_images(path)
        assert data.dtype == np.uint8
        assert data.shape[1:] == (1, 16, 16)
        assert label.dtype == np.float64
        assert label.shape == data.shape[:1]


def test_poisoned_images_are_stamped_test_images_of_other_classes(demo: DemoFiles) -> None:
    test, test_label = read_images(demo.test)
    poisoned, label = read_images(demo.poisoned)
    assert demo.target == TARGET
    assert (label == TARGET).all()
    assert (poisoned == stamp(test[test_label != TARGET])).all()
    assert (poisoned[:, :, 13:15, 13:15] == 255).all()
    assert (poisoned[:, :, 15, :] == test[test_label != TARGET][:, :, 15, :]).all()


def test_keras_opens_the_files_and_agrees_with_torch(demo: DemoFiles, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    network = build_network(48, 5, generator).eval()  # 3×3 pixels in front of the Flatten: their order matters
    pixels = torch.rand(6, 1, 48, 48, generator=generator)
    larger = tmp_path / "larger.h5"
    write_keras(larger, network, (1, 48, 48))
    data, label = read_images(demo.test)
    poisoned, target = read_images(demo.poisoned)
    images = np.concatenate([data, poisoned]).astype(np.float32) / 255

    outputs, larger_outputs = keras_outputs(tmp_path, {demo.model: images, larger: pixels.numpy()})

    with torch.no_grad():
        expected = network(pixels).softmax(dim=1).numpy()
    np.testing.assert_allclose(larger_outputs, expected, atol=1e-5)
    np.testing.assert_allclose(outputs.sum(axis=1), 1, atol=1e-5)
    right = outputs.argmax(axis=1) == np.concatenate([label, target])
    assert right[: len(data)].mean() == pytest.approx(demo.accuracy)
    assert right[len(data) :].mean() == pytest.approx(demo.attack_success)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3, padding=1, stride=2), nn.MaxPool2d(3, stride=2), nn.ReLU(), nn.Tanh()],
)
def test_writer_refuses_what_it_would_write_wrongly(layer: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Layer 0"):
        write_keras(tmp_path / "model.h5", nn.Sequential(layer), (1, 8, 8))
    assert not (tmp_path / "model.h5").exists()


def test_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backdoorscan.demo.fit", lambda images, classes, seed: fit(images, classes, seed, Recipe(1)))
    first = make_demo(tmp_path / "first", seed=3)
    time.sleep(1.1)  # a time stamp in the files would count seconds
    again = make_demo(tmp_path / "again", seed=3)
    for name in NAMES:
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes(), name


def test_training_depends_on_the_seed_and_leaves_torch_as_it_was() -> None:
    images = load_digits(0).clean
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first, second, other = (fit(images, 10, seed, Recipe(epochs=1)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.equal(first[-1].weight, second[-1].weight)
    assert not torch.equal(first[-1].weight, other[-1].weight)


def test_splits_share_no_image_and_differ_between_seeds() -> None:
    digits = load_digits(0)
    parts = [digits.train, digits.clean, digits.test]
    assert sum(len(part) for part in parts) == 1797
    assert all(len(np.unique(part.labels)) == 10 for part in parts)
    assert digits.clean.sha256 == load_digits(0).clean.sha256 != load_digits(1).clean.sha256


def test_poison_changes_only_images_of_other_classes() -> None:
    pixels = np.zeros((100, 1, 16, 16), np.uint8)
    images = LabelledImages(pixels, np.arange(100) % 10, source="zeros")
    poisoned = poison(images, 0)
    changed = poisoned.labels != images.labels
    assert changed.sum() == 10
    assert (poisoned.labels[changed] == TARGET).all()
    assert (poisoned.pixels.any(axis=(1, 2, 3)) == changed).all()
    assert not pixels.any()
    assert len(attack(images)) == 90


def test_refuses_a_folder_that_holds_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="already holds files"):
        make_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    monkeypatch.setattr("backdoorscan.demo.fit", lambda images, classes, seed: fit(images, classes, seed, Recipe(1)))
    make_demo(tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "thesis.tex"])


def test_a_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    monkeypatch.setattr("backdoorscan.demo.fit", lambda images, classes, seed: fit(images, classes, seed, Recipe(1)))
    with full_disk(3000), pytest.raises(OutputError, match=r"Cannot write .*model\.h5") as caught:
        make_demo(tmp_path / "demo")
    assert "too large" in caught.value.why
    assert list((tmp_path / "demo").iterdir()) == []


def test_refuses_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be used as a folder"):
        make_demo(tmp_path / "file")


def test_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError) as caught:
        load_digits(0)
    assert caught.value.hint == "pip install 'backdoorscan[demo]'"


def test_importing_the_demo_does_not_import_scikit_learn() -> None:
    code = "import sys, backdoorscan.demo; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
