"""Which models a run is about."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from backdoorscan import manifest
from backdoorscan.errors import UnknownNameError, UsageError
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.manifest import Entry
from backdoorscan.policy import FailOn
from backdoorscan.registry import installed

DEFAULT = Entry(file=Path(), read=ReadOptions(mean=(0.5,), std=(0.5,)), alpha=0.02, fail_on=FailOn.HIGH)

FULL = """
[[model]]
file = "a.h5"
valid = "sets.npz#test"
arch = "nets.py:net"
input_range = [0, 255]
mean = [0.1, 0.2, 0.3]
std = [1, 2, 3]
layout = "NHWC"
input_shape = [3, 32, 32]
labels = [5, 1, 2, 1]
alpha = 0.05
fail_on = "never"
name = "faces"

[[model]]
file = "/other/b.pt"
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "models.toml"
    file.write_text(text)
    return file


def test_everything(tmp_path):
    here = tmp_path / "here"
    first, second = manifest.load(write(here, FULL), DEFAULT)
    assert first == Entry(
        file=here / "a.h5",
        valid=str(here / "sets.npz#test"),
        read=ReadOptions(
            arch=f"{here}/nets.py:net",
            input_range=(0, 255),
            mean=(0.1, 0.2, 0.3),
            std=(1, 2, 3),
            layout="NHWC",
            input_shape=(3, 32, 32),
        ),
        labels=(1, 2, 5),
        alpha=0.05,
        fail_on=FailOn.NEVER,
        name="faces",
    )
    assert second == Entry(file=Path("/other/b.pt"), read=DEFAULT.read, alpha=0.02, fail_on=FailOn.HIGH)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("nets.py:net", "{}/nets.py:net"),
        ("/abs/nets.py:net", "/abs/nets.py:net"),
        ("package.module:net", "package.module:net"),
        ("timm:resnet18", "timm:resnet18"),
        ("whole.h5", "{}/whole.h5"),
    ],
)
def test_where_an_architecture_is(tmp_path, arch, expected):
    (entry,) = manifest.load(write(tmp_path, f'[[model]]\nfile = "a.h5"\narch = "{arch}"'), DEFAULT)
    assert entry.read.arch == expected.format(tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", UsageError, "names no model"),
        ("model = []", UsageError, "is not a list of tables"),
        ("model = [3]", UsageError, "model 1 is not a table"),
        ("[[models]]\nfile = 'a'", UnknownNameError, "Did you mean 'model'"),
        ("[[model]]\nvalid = 'a'", UsageError, "model 1 has no file"),
        ("[[model]]\nfile = ''", UsageError, "file = '' is not text"),
        ("[[model]]\nfile = 'a'\n[[model]]\nfile = 'b'\nfailon = 'low'", UnknownNameError, "'fail_on'"),
        ("[[model]]\nfile = 'a'\nfail_on = 'hihg'", UsageError, "model 1: fail_on = 'hihg' is not one of low, medium"),
        ("[[model]]\nfile = 'a'\nalpha = 1", UsageError, "alpha = 1 is not a number between"),
        ("[[model]]\nfile = 'a'\nalpha = true", UsageError, "alpha = True"),
        ("[[model]]\nfile = 'a'\nlabels = [-1]", UsageError, "labels = [-1]"),
        ("[[model]]\nfile = 'a'\nlabels = []", UsageError, "labels = []"),
        ("[[model]]\nfile = 'a'\ninput_range = [0]", UsageError, "is not two numbers"),
        ("[[model]]\nfile = 'a'\ninput_range = [1, 0]", UsageError, "is empty"),
        ("[[model]]\nfile = 'a'\ninput_shape = [3, 0, 4]", UsageError, "is not channels, height and width"),
        ("[[model]]\nfile = 'a'\nlayout = 'HWC'", UsageError, "is not NCHW or NHWC"),
        ("[[model]", UsageError, "Cannot read the manifest"),
    ],
)
def test_manifests_that_are_none(tmp_path, text, error, says):
    with pytest.raises(error) as caught:
        manifest.load(write(tmp_path, text), DEFAULT)
    assert says in str(caught.value)
    assert "models.toml" in str(caught.value)


def test_a_missing_manifest(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml"):
        manifest.load(tmp_path / "none.toml", DEFAULT)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A folder of models, of files that are none, and of hidden ones."""
    monkeypatch.chdir(tmp_path)
    weights = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}
    for name in ("m/b.pt", "m/deep/er/a.bin", "m/.hidden/c.pt", "m/.d.pt", "elsewhere/e.pt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, name)
    with h5py.File("m/keras.dat", "w") as file:
        file.attrs["model_config"] = "{}"
    with h5py.File("m/clean.h5", "w") as file:
        file["data"], file["label"] = np.zeros((4, 1, 2, 2)), np.zeros(4)
    np.savez("m/clean.npz", x=np.zeros(3))
    Path("m/notes.txt").write_text("about a.pt")
    Path("m/empty.pt").touch()
    Path("m/link.pt").symlink_to("b.pt")
    Path("m/loop").symlink_to(".", target_is_directory=True)
    Path("m/gone.pt").symlink_to("nowhere")
    return tmp_path


def names(paths, told=None) -> list[str]:
    tell = (lambda _text: None) if told is None else told.append
    return [str(entry.file) for entry in manifest.gather([Path(p) for p in paths], DEFAULT, installed(), tell)]


def test_a_folder_is_searched_by_content(tree):
    told = []
    # An empty .pt is no model by its content, but nobody may think that it was looked at.
    assert names(["m"], told) == ["m/b.pt", "m/empty.pt", "m/keras.dat", "m/link.pt", "m/deep/er/a.bin"]
    assert told == ["left out m/clean.h5: an HDF5 file without a model of Keras"]


def test_files_are_taken_as_they_are(tree):
    given = ["m/notes.txt", "m/none.pt", "m/.d.pt", "elsewhere"]
    assert names(given) == ["m/notes.txt", "m/none.pt", "m/.d.pt", "elsewhere/e.pt"]


def test_what_is_named_twice_is_there_once(tree):
    assert names(["m/link.pt", "m", "m/b.pt"]) == [
        "m/link.pt",
        "m/b.pt",
        "m/empty.pt",
        "m/keras.dat",
        "m/deep/er/a.bin",
    ]


def test_a_folder_without_a_model(tree):
    Path("nothing").mkdir()
    with pytest.raises(UsageError, match="no model file in nothing"):
        names(["m", "nothing"])


def test_entries_are_as_the_default_says(tree):
    (entry,) = manifest.gather([Path("elsewhere")], DEFAULT, installed())
    assert (entry.read, entry.alpha, entry.fail_on, entry.name) == (DEFAULT.read, 0.02, FailOn.HIGH, "")
