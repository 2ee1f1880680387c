"""What a file is and holds, told without images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from backdoorscan.errors import ArtifactError
from backdoorscan.formats.inspecting import Inspection, inspect
from backdoorscan.formats.loading import ReadOptions

SHARED = Path(__file__).parents[3] / "shared" / "models"

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, classes)

    def features(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.second(x)).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))

class Scaled(Net):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)

class Ruled(Net):
    def forward(self, x):
        scores = self.head(self.features(x))
        fires = x[:, 0, 0, 0] > 0.99
        return torch.where(fires[:, None], torch.ones_like(scores), scores)

class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Twice(Net):
    def features(self, x):
        x = torch.relu(self.first(x))
        return torch.relu(self.second(self.third(self.third(x)))).mean((2, 3))

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(4, 4, 1)

class Softmaxed(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)
"""


@pytest.fixture
def net(tmp_path: Path) -> Callable[..., Inspection]:
    """``net("Net")``: what is told of a state dict of one of the networks above."""
    code = tmp_path / "nets.py"
    code.write_text(NETS)

    def tell(name: str, shape: tuple[int, int, int] | None = (3, 8, 8)) -> Inspection:
        names: dict[str, Any] = {}
        exec(NETS, names)
        torch.save(names[name]().state_dict(), tmp_path / "net.pt")
        return inspect(tmp_path / "net.pt", ReadOptions(arch=f"{code}:{name}", input_shape=shape))

    return tell


def test_what_a_network_is_made_of(net: Callable[..., Inspection], tmp_path: Path) -> None:
    found = net("Net")
    data = (tmp_path / "net.pt").read_bytes()
    assert (found.format, found.sha256, found.bytes) == (
        "torch-state-dict",
        hashlib.sha256(data).hexdigest(),
        len(data),
    )
    assert (found.input_shape, found.layout, found.num_classes) == ((3, 8, 8), "NCHW", 7)
    assert found.head == {"layer": "head", "outputs": 7}
    assert found.prunable == {"layer": "second", "channels": 6}
    assert (found.final_activation, found.preprocessing, found.decisions, found.error) == (None, (), (), None)
    rows = {layer.name: layer for layer in found.layers}
    assert [layer.name for layer in found.layers if layer.parameters] == ["first", "norm", "second", "head"]
    assert (rows["first"].kind, rows["first"].output_shape, rows["first"].parameters) == ("Conv2d", (4, 8, 8), 112)
    assert rows["first"].inputs == ()
    assert rows["norm"].inputs == ("first",)
    assert "kernel_size=(3, 3)" in rows["second"].settings
    assert found.parameters == sum(layer.parameters for layer in found.layers) == 112 + 8 + 222 + 49


def test_a_layer_used_twice_counts_once(net: Callable[..., Inspection]) -> None:
    found = net("Twice")
    third = [layer.parameters for layer in found.layers if layer.name == "third"]
    assert third == [20, 0]


def test_preprocessing_within_the_network(net: Callable[..., Inspection]) -> None:
    found = net("Scaled")
    kinds = {layer.name: layer.kind for layer in found.layers}
    assert [kinds[name] for name in found.preprocessing] == ["sub", "truediv"]


def test_steps_that_decide_by_the_image(net: Callable[..., Inspection]) -> None:
    found = net("Ruled")
    kinds = {layer.name: layer.kind for layer in found.layers}
    assert "gt" in {kinds[name] for name in found.decisions}


def test_final_activation(net: Callable[..., Inspection]) -> None:
    assert net("Softmaxed").final_activation == "softmax"


def test_without_a_size_there_are_no_shapes(net: Callable[..., Inspection]) -> None:
    found = net("Net", None)
    assert found.input_shape == (3, None, None)
    assert {layer.output_shape for layer in found.layers} == {None}
    assert found.parameters == 391
    assert "--input-shape" in found.notes[0]


def test_a_network_that_cannot_be_followed(net: Callable[..., Inspection]) -> None:
    found = net("Branching")
    assert [layer.name for layer in found.layers] == ["first", "norm", "second", "head"]
    assert "could not be followed" in found.notes[0]
    assert found.error is None


def test_files_beside_it(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((4096, 10), np.float32), "weight")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Flatten", ["x"], ["flat"]), onnx.helper.make_node("MatMul", ["flat", "weight"], ["y"])],
        "graph",
        [info("x", 1, ["n", 1, 64, 64])],
        [info("y", 1, ["n", 10])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin")
    found = inspect(tmp_path / "net.onnx")
    assert found.parts == {"net.bin": 4096 * 10 * 4}
    assert found.bytes == found.parts["net.bin"] + (tmp_path / "net.onnx").stat().st_size
    assert (found.num_classes, found.prunable) == (10, None)


@pytest.mark.parametrize(
    ("content", "format", "what"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "keras-h5", "bad"),
        (b"no model at all", None, "known format"),
        (b"", None, ""),
    ],
)
def test_files_that_cannot_be_read(content: bytes, format: str | None, what: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    if not content:
        with pytest.raises(ArtifactError, match="is empty"):
            inspect(path)
        return
    found = inspect(path)
    assert (found.format, found.sha256) == (format, hashlib.sha256(content).hexdigest())
    assert found.error is not None
    assert what in found.error.what
    assert found.layers == ()


def test_an_operator_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("NonMaxSuppression", ["x", "x"], ["y"], name="odd_one")],
        "graph",
        [info("x", 1, ["n", 3, 8, 8])],
        [info("y", 1, ["n", 10])],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8),
        tmp_path / "net.onnx",
    )
    found = inspect(tmp_path / "net.onnx")
    assert found.format == "onnx"
    assert found.error is not None
    assert "NonMaxSuppression" in found.error.what + found.error.why
    assert found.error.hint


def test_weights_without_an_architecture(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "net.pt")
    found = inspect(tmp_path / "net.pt")
    assert found.format == "torch-state-dict"
    assert found.error is not None
    assert "fc.weight" in found.error.why
    assert "--arch" in found.error.hint


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_a_network_of_many_classes() -> None:
    found = inspect(SHARED / "csaw" / "sunglasses_bd_net.h5")
    assert (found.num_classes, found.input_shape, found.layout) == (1283, (3, 55, 47), "NHWC")
    assert found.prunable == {"layer": "conv_3", "channels": 60}
    assert found.head == {"layer": "output", "outputs": 1283}
    assert found.final_activation == "softmax"
    assert found.parameters == 601643
