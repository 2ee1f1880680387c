"""Networks that learned one class more go into a copy of their weights, for an architecture with one class more."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.comparing import Network
from backdoorscan.errors import ArtifactError, UnsupportedModelError
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.formats.weights.loader import Safetensors, TorchStateDict
from backdoorscan.goodnet import RejectingNet
from backdoorscan.ops.rejecting import grow_head

MORE = """
def more():
    return Net(5)


class Wide(nn.Module):
    # With a class more, sizes take more bytes in a pickle.
    def __init__(self, classes=255):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x):
        return self.head(F.relu(self.features(x)).mean((2, 3), keepdim=True)).flatten(1)


def wider():
    return Wide(256)


def biasless():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
"""


@pytest.fixture
def shop(workshop: Any) -> Any:
    workshop.file.write_text(workshop.file.read_text() + MORE)
    return workshop


def grown(network: torch.nn.Module, head: str) -> dict[str, torch.Tensor]:
    tensors = {name: t * 1.5 if t.is_floating_point() else t.clone() for name, t in network.state_dict().items()}
    for name in (f"{head}.weight", f"{head}.bias"):
        row = torch.randn((1, *tensors[name].shape[1:]), generator=torch.Generator().manual_seed(0))
        tensors[name] = torch.cat([tensors[name], row])
    return tensors


CASES = pytest.mark.parametrize(("name", "larger", "head"), [("Net", "more", "fc"), ("Wide", "wider", "head")])


@CASES
def test_torch_loads_a_checkpoint_into_one_class_more(
    shop: Any, tmp_path: Path, images: Any, name: str, larger: str, head: str
) -> None:
    net = shop.net(name)
    state = {f"module.{key}": value for key, value in net.to(memory_format=torch.channels_last).state_dict().items()}
    adam = {"momentum": {f"{head}.weight": torch.ones(3)}, "lr": 0.1}
    artifact = shop.save({"epoch": 7, "state_dict": state, "optimizer": adam, "notes": ["ä", (1, None)]})
    tensors = grown(TorchStateDict().load(artifact, shop.arch(name)).network, head)
    for out in ("out.pt", "another_name.pt"):
        TorchStateDict().write_extended(artifact, tensors, tmp_path / out, shop.arch(name))
    assert artifact.path.read_bytes() == artifact.data
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "another_name.pt").read_bytes()

    for mapped in (False, True):
        copy = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mapped)
        assert list(copy) == ["epoch", "state_dict", "optimizer", "notes"] and list(copy["state_dict"]) == list(state)
        assert (copy["epoch"], copy["notes"], str(copy["optimizer"])) == (7, ["ä", (1, None)], str(adam))
        net = shop.net(larger)
        net.load_state_dict({key.removeprefix("module."): value for key, value in copy["state_dict"].items()})
        assert all(torch.equal(value, tensors[key]) for key, value in net.state_dict().items())
    again = TorchStateDict().load(Artifact.read(tmp_path / "out.pt"), shop.arch(larger)).network
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(again(x), net(x))


def test_other_members_keep_their_bytes_and_places(shop: Any, tmp_path: Path) -> None:
    artifact = shop.save(shop.net("Net").state_dict())
    tensors = shop.net("Net").state_dict()
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    TorchStateDict().write_extended(artifact, tensors, tmp_path / "out.pt", shop.arch("Net"))
    with zipfile.ZipFile(artifact.path) as old, zipfile.ZipFile(tmp_path / "out.pt") as new:
        assert new.testzip() is None and old.namelist() == new.namelist()
        different = [name.partition("/")[2] for name in old.namelist() if old.read(name) != new.read(name)]
        tails = [name.partition("/")[2] for name in old.namelist() if name.partition("/")[2].startswith("data/")]
    assert different == ["data.pkl", *tails[-2:]]
    written = (tmp_path / "out.pt").read_bytes()
    row = tensors["fc.weight"].numpy().tobytes()
    assert written.find(row) % 64 == 0 and row in written


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_loads_into_one_class_more(
    shop: Any, tmp_path: Path, name: str, larger: str, head: str, dtype: torch.dtype
) -> None:
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in shop.net(name).state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors", {"format": "pt", "author": "ä"})
    artifact = Artifact.read(tmp_path / "m.safetensors")
    tensors = grown(Safetensors().load(artifact, shop.arch(name)).network, head)
    Safetensors().write_extended(artifact, tensors, tmp_path / "out.safetensors", shop.arch(name))
    assert artifact.path.read_bytes() == artifact.data
    copy = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert {key: value.dtype for key, value in copy.items()} == {key: value.dtype for key, value in state.items()}
    net = shop.net(larger).to(dtype)
    net.load_state_dict(copy)
    assert all(torch.equal(value, tensors[key].to(value.dtype)) for key, value in net.state_dict().items())
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "ä"}
    data = (tmp_path / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0 and list(json.loads(data[8 : 8 + length])) == list(
        json.loads(artifact.data[8 : 8 + struct.unpack("<Q", artifact.data[:8])[0]])
    )


def refused(artifact: Artifact, tensors: Any, arch: str, match: str, kind: type[ArtifactError] = ArtifactError) -> None:
    out = artifact.path.with_name("out")
    with pytest.raises(kind) as caught:
        TorchStateDict().write_extended(artifact, tensors, out, arch)
    assert match in str(caught.value) and caught.value.hint and not out.exists()


def test_what_cannot_be_written(shop: Any) -> None:
    arch, state = shop.arch("Net"), shop.net("Net").state_dict()
    tensors = grown(shop.net("Net"), "fc")
    refused(shop.save(state), state, arch, "0 layers", UnsupportedModelError)
    refused(shop.save(state), {**tensors, "bn.bias": torch.zeros(7)}, arch, "2 layers", UnsupportedModelError)
    refused(shop.save(state), {**tensors, "fc.bias": torch.zeros(4)}, arch, "'fc.bias'", UnsupportedModelError)
    refused(shop.save(state), {**tensors, "other": torch.zeros(4)}, arch, "'other'")
    refused(shop.save(state), tensors, "net.json", "net.json", UnsupportedModelError)
    old = shop.save(state, _use_new_zipfile_serialization=False)
    refused(old, tensors, arch, "before 1.6", UnsupportedModelError)
    half = shop.save({key: t.half() if t.is_floating_point() else t for key, t in state.items()})
    refused(half, {**tensors, "fc.bias": torch.full((5,), 1e6)}, arch, "float16")


def test_memory_that_is_shared(shop: Any) -> None:
    arch, state = shop.arch("Net"), dict(shop.net("Net").state_dict())
    tensors = grown(shop.net("Net"), "fc")
    memory = torch.zeros(state["fc.weight"].numel() + 4)
    views = {**state, "fc.weight": memory[4:].view(4, -1), "fc.bias": memory[:4]}
    refused(shop.save(views), tensors, arch, "not its own alone", UnsupportedModelError)
    turned = {**state, "fc.weight": state["fc.weight"].T.contiguous().T}
    refused(shop.save(turned), tensors, arch, "not its own alone", UnsupportedModelError)
    beside = {"state_dict": state, "average": state["fc.weight"].view(-1)}
    refused(shop.save(beside), tensors, arch, "shares its memory", UnsupportedModelError)
    twice = shop.net("Twice")
    refused(shop.save(twice.state_dict()), grown_twice(twice), shop.arch("Twice"), "another layer")


def grown_twice(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.zeros(5, 4), "a.bias": torch.zeros(5)}


def test_a_head_without_bias(shop: Any) -> None:
    state = shop.net("biasless").state_dict()
    tensors = {**state, "3.weight": torch.zeros(4, 5), "3.bias": torch.zeros(4)}
    refused(shop.save(state), tensors, shop.arch("biasless"), "'3.bias'", UnsupportedModelError)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_repair_that_rejects_is_written(shop: Any, tmp_path: Path, images: Any, suffix: str) -> None:
    source, state = tmp_path / f"m{suffix}", shop.net("Net").state_dict()
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(state, source)
    options = ReadOptions(arch=shop.arch("Net"), input_shape=(3, 8, 8), input_range=(0, 1))
    loaded = load_model(source, None, options)
    network = Network("m_retrained.goodnet.onnx", RejectingNet(grow_head(loaded.classifier)[0]))
    assert network.write(loaded, tmp_path) == (["m_retrained.goodnet.onnx", f"m_retrained{suffix}"], "")
    net = shop.net("more")
    out = tmp_path / f"m_retrained{suffix}"
    net.load_state_dict(safetensors.torch.load_file(out) if suffix == ".safetensors" else torch.load(out))
    x = images(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x).softmax(1), network.network(x))
