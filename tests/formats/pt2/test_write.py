"""Repaired networks go back into a copy of the file, which torch itself then reads."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest
import torch
from torch import nn

from backdoorscan.errors import ArtifactError, OutputError
from backdoorscan.formats.pt2.loader import Pt2


@pytest.fixture
def write(artifact, tmp_path):
    def to_bytes(data, weights, path=None):
        path = path or tmp_path / "repaired.pt2"
        Pt2().write(artifact(data), weights, path)
        return path.read_bytes()

    return to_bytes


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_round_trip_through_torch(resnet_file, load, write):
    network = load(resnet_file).network
    with torch.no_grad():
        network.get_parameter("layer1.0.conv2.weight")[3] = 0
        network.get_parameter("fc.bias").add_(1)
        network.get_buffer("bn1.running_mean").mul_(2)
    data = write(resnet_file, network.state_dict())
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(torch.export.load(io.BytesIO(data)).module()(images), expected)
        torch.testing.assert_close(load(data).network(images), expected)
    before, after = members(resnet_file), members(data)
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 3
    assert write(resnet_file, network.state_dict()) == data


def test_nothing_changed_means_the_same_bytes(resnet_file, load, write):
    assert write(resnet_file, load(resnet_file).network.state_dict()) == resnet_file


def test_only_the_changed_bytes_differ(resnet_file, load, write):
    weights = {"fc.bias": load(resnet_file).network.state_dict()["fc.bias"] + 1}
    data = write(resnet_file, weights)
    differing = sum(a != b for a, b in zip(resnet_file, data, strict=True))
    # Five floats, and the checksum behind them and in the table of contents.
    assert 0 < differing <= 5 * 4 + 2 * 4


@pytest.mark.parametrize("decomposed", [False, True])
def test_every_tensor_comes_back(decomposed, network, save, load, write):
    data = save(network("vit"), decomposed=decomposed)
    weights = {
        name: tensor + 0.25 if tensor.is_floating_point() and not name.startswith("constant") else tensor
        for name, tensor in load(data).network.state_dict().items()
    }
    found = load(write(data, weights)).network.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_memory_in_another_order(save, load, write):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model.to(memory_format=torch.channels_last)
    data = save(model)
    weights = {"0.weight": torch.randn(4, 3, 3, 3)}
    assert torch.equal(load(write(data, weights)).network.state_dict()["0.weight"], weights["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_files_own_precision(dtype, save, load, write):
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3, dtype=dtype)

        def forward(self, x):
            return self.fc(x.to(dtype)).float()

    model = Typed().eval()
    data = save(model, (4,))
    weights = load(data).network.state_dict()
    weights["fc.weight"] = weights["fc.weight"].clone()
    weights["fc.weight"][0] = 1.5
    stored = torch.export.load(io.BytesIO(write(data, weights))).state_dict["fc.weight"]
    assert stored.dtype == dtype
    assert stored[0].tolist() == [1.5] * 4
    assert torch.equal(stored[1:], model.fc.weight[1:])
    if dtype == torch.float16:
        weights["fc.weight"][0] = 1e9
        with pytest.raises(ArtifactError, match="range of float16"):
            write(data, weights)


def test_tied_weights_stay_tied(save, load, write):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    data = save(Tied().eval(), (4,))
    weights = {name: tensor * 2 for name, tensor in load(data).network.state_dict().items()}
    assert all(torch.equal(t, weights[name]) for name, t in load(write(data, weights)).network.state_dict().items())
    shared = [name for name, tensor in weights.items() if tensor.ndim == 2]
    assert len(shared) == 2
    with pytest.raises(ArtifactError, match="together with another"):
        write(data, weights | {shared[1]: weights[shared[1]] + 1})


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"nothing": torch.ones(1)}, "no tensor 'nothing'"), ({"fc.bias": torch.ones(7)}, "has the shape")],
)
def test_what_the_file_cannot_hold(weights, message, resnet_file, write):
    with pytest.raises(ArtifactError, match=message):
        write(resnet_file, weights)


def test_a_disk_that_refuses(resnet_file, write, tmp_path):
    with pytest.raises(OutputError):
        write(resnet_file, {}, tmp_path / "no" / "folder.pt2")


def test_a_checksum_that_is_elsewhere(resnet_file, load, write):
    weights = {"fc.bias": load(resnet_file).network.state_dict()["fc.bias"] + 1}
    size = weights["fc.bias"].nbytes
    old = load(resnet_file).network.state_dict()["fc.bias"].numpy().tobytes()
    place = resnet_file.index(old) + size
    assert resnet_file[place : place + 4] == b"PK\x07\x08"
    broken = bytearray(resnet_file)
    broken[place + 4 : place + 8] = struct.pack("<I", 1)
    with pytest.raises(ArtifactError, match="checksum of"):
        write(bytes(broken), weights)
