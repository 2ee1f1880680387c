"""docs/formats.md says what the readers do, and its snippets make files that they read."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import pytest
import torch
from torch import nn

from backdoorscan.formats.keras import layers
from backdoorscan.formats.keras.layers import merging, operations
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.formats.onnx import operators as onnx_operators
from backdoorscan.formats.pt2 import operators as pt2_operators
from backdoorscan.registry import installed

TEXT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")


def name_of(snippet: str) -> str:
    """The file that a snippet writes."""
    (name,) = re.findall(r'"(\S+\.\w+)"', snippet)
    return str(name)


SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ARCHITECTURE = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
"""


def section(title: str) -> str:
    return re.split(r"\n##+ ", TEXT.split(f"\n{title}\n", 1)[1])[0]


def listed(title: str) -> set[str]:
    return {name for block in re.findall(r"```text\n(.*?)```", section(title), re.DOTALL) for name in block.split()}


def test_every_format_is_in_both_tables() -> None:
    formats = {plugin.id for plugin in installed().of_kind("loader")}
    for title in ("## What is read", "## Writing back"):
        first = "\n".join(line.split("|")[1] for line in section(title).splitlines() if line.startswith("| `"))
        assert set(re.findall(r"`([\w-]+)`", first)) & formats >= formats - {"tensorflow-savedmodel", "converted"}


@pytest.mark.parametrize(
    ("title", "known"),
    [
        ("### Keras layers", {*layers._LAYERS, *merging.LAYERS, *operations.OPERATIONS}),
        ("### ONNX operators", set(onnx_operators._OPERATORS)),
        ("### PyTorch operators", {*pt2_operators._FUNCTIONS, *pt2_operators._TAKEN}),
    ],
)
def test_the_lists_are_those_of_the_code(title: str, known: set[str]) -> None:
    assert listed(title) == known


def torch_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def keras_model() -> Any:
    keras = pytest.importorskip("keras")
    return keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3, activation="relu"), keras.layers.Flatten(),
         keras.layers.Dense(3)]
    )  # fmt: skip


@pytest.mark.parametrize("snippet", SNIPPETS, ids=name_of)
def test_snippets_make_files_that_are_read(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = keras_model() if "import keras" in snippet else torch_model()
    images = torch.rand(4, 1, 8, 8)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(snippet, {"model": model, "images": images})
            expected = model(images.permute(0, 2, 3, 1) if "import keras" in snippet else images)
    finally:
        logging.disable(logging.NOTSET)
    file = tmp_path / name_of(snippet)
    options = ReadOptions()
    if file.stem == "weights":
        (tmp_path / "arch.py").write_text(ARCHITECTURE)
        options = ReadOptions(arch=f"{tmp_path / 'arch.py'}:net", input_shape=(1, 8, 8))
    classifier = load_model(file, None, options).classifier
    torch.testing.assert_close(classifier(images), torch.as_tensor(expected).detach(), atol=1e-5, rtol=1e-5)


def test_there_is_a_snippet_for_every_kind_of_file() -> None:
    assert {Path(name_of(text)).suffix for text in SNIPPETS} == {
        ".onnx",
        ".pt2",
        ".pt",
        ".safetensors",
        ".keras",
        ".h5",
    }


def test_every_link_leads_somewhere() -> None:
    root = Path(__file__).parents[1]
    for page in (root / "docs" / "formats.md", root / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target
