"""Models in other formats: the same scores, the same bytes each time, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.errors import (
    ArtifactError,
    ImagesError,
    OutputError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from backdoorscan.formats import converting
from backdoorscan.formats.converting import FORMATS, Conversion, convert
from backdoorscan.formats.inspecting import inspect
from backdoorscan.formats.loading import ReadOptions
from backdoorscan.formats.opening import open_network
from backdoorscan.formats.weights.loader import Safetensors
from backdoorscan.registry import installed

NETS = """
import torch
from torch import nn

def image():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 4, 5), nn.Softmax(1)]
    return nn.Sequential(*layers)

def pooled():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

def flat():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(48, 4))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else -x.mean((2, 3)))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.two(torch.relu(self.one(self.conv(x).amax((2, 3))) * self.scale))
"""


class Nets:
    """Networks as state dicts with their architectures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.code = folder / "nets.py"
        self.code.write_text(NETS)
        self.names: dict[str, Any] = {}
        exec(NETS, self.names)

    def build(self, name: str) -> nn.Module:
        network: nn.Module = self.names[name]()
        return network.eval()

    def save(self, name: str) -> Path:
        path = self.folder / f"{name}.pt"
        torch.save(self.build(name).state_dict(), path)
        return path

    def options(self, name: str, **given: Any) -> ReadOptions:
        return ReadOptions(arch=f"{self.code}:{name}", **{"input_shape": (3, 8, 6), **given})

    def convert(self, name: str, out: str, **given: Any) -> Conversion:
        known = {key: given.pop(key) for key in ("input_range", "mean", "std", "layout", "input_shape") if key in given}
        return convert(self.save(name), self.folder / out, self.options(name, **known), **given)


@pytest.fixture
def nets(tmp_path: Path) -> Nets:
    return Nets(tmp_path)


def run(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    """The scores of a new file, by whoever is not us where there is somebody else."""
    with torch.no_grad():
        if path.suffix == ".onnx":
            return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input": inputs.numpy()})[0])
        if path.suffix == ".pt2":
            return torch.export.load(path).module()(inputs)
        options = ReadOptions(arch=str(path.with_suffix(".json")))
        opened = open_network(Artifact.read(path), options, installed())
        return opened.network(inputs.permute(0, 3, 1, 2) if opened.channels_last else inputs)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["image", "flat", "Tied"])
def test_the_new_file_computes_what_the_network_does(suffix: str, name: str, nets: Nets) -> None:
    shape = (48,) if name == "flat" else (3, 8, 6)
    report = nets.convert(name, f"new.{suffix}", **({"input_shape": (3, 4, 4)} if name == "flat" else {}))
    inputs = torch.rand(7, *shape)
    with torch.no_grad():
        torch.testing.assert_close(
            run(nets.folder / f"new.{suffix}", inputs), nets.build(name)(inputs), atol=1e-5, rtol=0
        )
    assert (report.input_shape, report.layout, report.format) == (shape, "NCHW", suffix)
    assert report.difference <= report.tolerance
    assert [file["bytes"] for file in report.files] == [Path(file["path"]).stat().st_size for file in report.files]
    assert [file["sha256"] for file in report.files] == [Artifact.read(file["path"]).sha256 for file in report.files]


@pytest.mark.parametrize("suffix", FORMATS)
def test_layers_keep_their_names_and_the_final_activation_stays(suffix: str, nets: Nets) -> None:
    nets.convert("image", f"new.{suffix}")
    arch = str(nets.folder / "new.json") if suffix == "safetensors" else None
    found = inspect(nets.folder / f"new.{suffix}", ReadOptions(arch=arch))
    assert found.error is None
    assert found.final_activation == "softmax"
    assert found.prunable is not None and found.prunable["channels"] == 4
    own = {layer.parameters for layer in inspect(nets.folder / "image.pt", nets.options("image")).layers}
    assert {layer.parameters for layer in found.layers} <= own


@pytest.mark.parametrize("suffix", FORMATS)
def test_channels_last_stay_last(suffix: str, nets: Nets) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nets.build("pooled")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.permute(0, 3, 1, 2))

    program = torch.export.export(
        Last().eval(), (torch.rand(2, 8, 6, 1),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, nets.folder / "last.pt2")
    report = convert(nets.folder / "last.pt2", nets.folder / f"new.{suffix}")
    assert (report.input_shape, report.layout) == ((8, 6, 1), "NHWC")
    inputs = torch.rand(3, 8, 6, 1)
    with torch.no_grad():
        torch.testing.assert_close(run(nets.folder / f"new.{suffix}", inputs), Last()(inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "suffix"), [("image", "onnx"), ("image", "safetensors"), ("flat", "pt2")])
def test_pixels_make_the_convention_a_part_of_the_network(name: str, suffix: str, nets: Nets) -> None:
    size = (3, 8, 6) if name == "image" else (3, 4, 4)
    feeding: dict[str, Any] = {"input_range": (0.0, 255.0), "mean": (100.0, 120.0, 90.0), "std": (50.0, 60.0, 70.0)}
    report = nets.convert(name, f"new.{suffix}", pixels=True, input_shape=size, **feeding)
    assert (report.input_shape, report.layout) == (size, "NCHW")
    convention = InputConvention(0, 255, feeding["mean"], feeding["std"])
    assert report.pixels == convention
    assert report.to_json()["pixels"] == {"low": 0.0, "high": 255.0, "mean": feeding["mean"], "std": feeding["std"]}
    pixels = torch.rand(3, *size)
    with torch.no_grad():
        fed = convention.apply(pixels)
        expected = nets.build(name)(fed if name == "image" else fed.flatten(1))
        torch.testing.assert_close(run(nets.folder / f"new.{suffix}", pixels), expected, atol=1e-4, rtol=1e-5)


def test_pixels_need_somebody_who_knows(nets: Nets) -> None:
    with pytest.raises(UsageError, match="is fed"):
        nets.convert("image", "new.pt2", pixels=True)
    assert not (nets.folder / "new.pt2").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_model_gives_the_same_bytes_which_tell_no_paths(suffix: str, nets: Nets) -> None:
    first, second = (nets.convert("image", f"{name}.{suffix}") for name in ("first", "second"))
    assert [file["sha256"] for file in first.files] == [file["sha256"] for file in second.files]
    for file in first.files:
        data = Path(file["path"]).read_bytes()
        assert b".py" not in data
        assert str(nets.folder).encode() not in data
        assert b"site-packages" not in data


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (lambda network, example: [converting.export_pt2(nn.Sequential(network, Halve()), example)], "differ by"),
        (lambda network, example: [b"garbage"], "read back"),
    ],
)
def test_what_does_not_compute_the_same_is_not_written(
    writer: Callable[..., list[bytes]], message: str, nets: Nets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converting, "FORMATS", {"pt2": writer})
    before = sorted(nets.folder.iterdir())
    with pytest.raises(UnsupportedModelError, match="was not written") as caught:
        nets.convert("image", "new.pt2")
    assert message in str(caught.value)
    assert sorted(nets.folder.iterdir()) == sorted([*before, nets.folder / "image.pt"])


class Halve(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_a_network_that_follows_its_data(nets: Nets) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be exported"):
        nets.convert("Branching", "new.onnx")
    assert not (nets.folder / "new.onnx").exists()


def test_the_size_must_be_known(nets: Nets) -> None:
    with pytest.raises(ImagesError, match="how large"):
        nets.convert("image", "new.pt2", input_shape=None)
    with pytest.raises(ImagesError, match="do not fit"):
        nets.convert("image", "new.pt2", input_shape=(1, 8, 6))
    with pytest.raises(ImagesError, match="cannot be fed"):
        nets.convert("image", "new.pt2", input_shape=(3, 9, 9))


def test_formats_that_cannot_be_written(nets: Nets) -> None:
    with pytest.raises(UsageError, match="does not tell"):
        nets.convert("image", "new.h5")
    with pytest.raises(UnknownNameError, match="format"):
        nets.convert("image", "new.onnx", to="onx")
    assert nets.convert("image", "new.dat", to="pt2").format == "pt2"


def test_what_is_there_is_kept(nets: Nets) -> None:
    path = nets.save("image")
    with pytest.raises(OutputError, match="is the model itself"):
        convert(path, path, nets.options("image"), to="pt2", force=True)
    with pytest.raises(OutputError, match="is the model itself"):
        convert(path, nets.code, nets.options("image"), to="pt2", force=True)
    (nets.folder / "new.json").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        nets.convert("image", "new.safetensors")
    assert not (nets.folder / "new.safetensors").exists()
    nets.convert("image", "new.safetensors", force=True)
    assert json.loads((nets.folder / "new.json").read_text())["schema"] == "backdoorscan.graph/1"
    with pytest.raises(OutputError, match="is a folder"):
        convert(path, nets.folder, nets.options("image"), to="pt2")
    with pytest.raises(OutputError, match="there is no folder"):
        nets.convert("image", "none/new.pt2")


def test_repaired_weights_go_into_a_copy_of_the_safetensors(nets: Nets) -> None:
    nets.convert("Tied", "new.safetensors")
    path, arch = nets.folder / "new.safetensors", str(nets.folder / "new.json")
    network = Safetensors().load(Artifact.read(path), arch).network
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if name.startswith("conv"):
                tensor[0] = 0
    Safetensors().write(Artifact.read(path), network.state_dict(), nets.folder / "repaired.safetensors", arch)
    again = Safetensors().load(Artifact.read(nets.folder / "repaired.safetensors"), arch).network
    inputs = torch.rand(3, 3, 8, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), network(inputs))
    old, new = path.read_bytes(), (nets.folder / "repaired.safetensors").read_bytes()
    assert len(old) == len(new)
    changed = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    assert 0 < len(changed) <= (27 + 1) * 4


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        graph = json.loads(data)
        change(graph)
        return json.dumps(graph).encode()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:100], "is not JSON"),
        (lambda data: b"[" * 100_000, "is not JSON"),
        (lambda data: b'{"class_name": "Sequential"}', "is no graph"),
        (spoilt(lambda graph: graph.pop("steps")), "is damaged"),
        (spoilt(lambda graph: graph["steps"].reverse()), "not there yet"),
        (spoilt(lambda graph: graph["steps"].append(graph["steps"][0])), "a second time"),
        (spoilt(lambda graph: graph.update(scores="nothing")), "nothing makes"),
        (spoilt(lambda graph: graph["steps"][0].update(operator="torch.ops.aten.from_file.default")), "cannot be read"),
        (spoilt(lambda graph: graph["steps"][0].update(operator="os.system")), "cannot be read"),
        (spoilt(lambda graph: next(iter(graph["tensors"].values())).update(shape=[1, 2])), "does not fit"),
        (spoilt(lambda graph: next(iter(graph["tensors"].values())).update(key="other")), "does not fit"),
        (spoilt(lambda graph: graph["image"].update(shape=[None, None, 8, 6])), "known size"),
        (spoilt(lambda graph: graph["image"].update(shape=[None, 3, 2**40, 2**40])), ""),
        (spoilt(lambda graph: graph["image"].update(shape=[])), ""),
        (spoilt(lambda graph: graph["steps"][0]["arguments"].update(stride={"evil": 1})), "is damaged"),
    ],
)
def test_graphs_that_are_refused(spoil: Callable[[bytes], bytes], message: str, nets: Nets) -> None:
    nets.convert("image", "new.safetensors")
    graph = nets.folder / "new.json"
    graph.write_bytes(spoil(graph.read_bytes()))
    with pytest.raises(ArtifactError) as caught:
        Safetensors().load(Artifact.read(nets.folder / "new.safetensors"), str(graph))
    assert message in str(caught.value)


def test_a_graph_that_is_not_there(nets: Nets) -> None:
    nets.convert("image", "new.safetensors")
    with pytest.raises(UsageError, match="Cannot read the graph"):
        Safetensors().load(Artifact.read(nets.folder / "new.safetensors"), "none.json")
