"""Folders as Hugging Face keeps models."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.formats.weights.huggingface import HuggingFace

TIMM = {
    "architecture": "net",
    "num_classes": 4,
    "model_args": {"num_classes": 4, "in_chans": 3, "global_pool": "avg", "img_size": [12, 12]},
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "input_size": [3, 12, 12]},
}
TRANSFORMERS = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "auto_map": {"AutoModel": "modeling.py--Model"},
}
Images = Callable[..., torch.Tensor]


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch, workshop: Any) -> None:
    """A package timm with one network."""

    def create_model(
        name: str, pretrained: bool, num_classes: int = 1000, global_pool: str = "avg", img_size: Any = None
    ) -> nn.Module:
        assert not pretrained and global_pool == "avg"
        net = workshop.net("Net")
        net.fc = nn.Linear(net.fc.in_features, num_classes)
        return net

    package: Any = types.ModuleType("timm")
    package.create_model, package.is_model = create_model, lambda name: name == "net"
    package.list_models = lambda: ["net", "nest"]
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))


def folder(tmp_path: Path, config: Any, **files: bytes) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    (place / "README.md").write_text("# a model\n")
    if config is not None:
        (place / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (place / name.replace("__", ".")).write_bytes(data)
    return place


def sharded(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    first, second = dict(list(state.items())[:3]), dict(list(state.items())[3:])
    names = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": names}).encode()
    return {
        "model__safetensors__index__json": index,
        "a__safetensors": safetensors.torch.save(first),
        "b__safetensors": safetensors.torch.save(second),
    }


def weights(workshop: Any, kind: str) -> dict[str, bytes]:
    state = workshop.net("Net").state_dict()
    if kind == "shards":
        return sharded(state)
    if kind == "bin":
        return {"pytorch_model__bin": workshop.save(state).data}
    return {"model__safetensors": safetensors.torch.save(state)}


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("kind", ["one", "shards", "bin"])
def test_a_folder_of_timm_needs_no_architecture(workshop: Any, images: Images, tmp_path: Path, kind: str) -> None:
    artifact = Artifact.read(folder(tmp_path, TIMM, **weights(workshop, kind)))
    assert HuggingFace().accepts(artifact)
    loaded = HuggingFace().load(artifact, None)
    x = images(2, 3, 9, 9)
    assert torch.equal(loaded.network(x), workshop.net("Net")(x))
    assert loaded.details["architecture"] == "timm:net" and loaded.details["arch"] is None
    assert loaded.details["model_args"] == {"global_pool": "avg", "img_size": [12, 12]}
    assert loaded.convention == InputConvention(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    assert (loaded.usual_shape, loaded.input_shape, loaded.num_classes) == ((3, 12, 12), (3, None, None), 4)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("kind", ["one", "shards", "bin"])
def test_a_copy_of_the_folder_differs_only_in_the_weights(workshop: Any, tmp_path: Path, kind: str) -> None:
    place = folder(tmp_path, TIMM, **weights(workshop, kind))
    artifact = Artifact.read(place)
    changed = HuggingFace().load(artifact, None).network.state_dict()["conv.weight"].clone()
    changed[1] = 0
    for name in ("copy", "again"):
        HuggingFace().write(artifact, {"conv.weight": changed}, tmp_path / name)
    copy, again = Artifact.read(tmp_path / "copy"), Artifact.read(tmp_path / "again")
    assert copy.sha256 == again.sha256 != artifact.sha256
    assert len([name for name in artifact.parts if artifact.parts[name] != copy.parts[name]]) == 1
    assert artifact.parts.keys() == copy.parts.keys()
    assert torch.equal(HuggingFace().load(copy, None).network.state_dict()["conv.weight"], changed)
    assert Artifact.read(place).sha256 == artifact.sha256


def test_the_user_s_architecture_comes_first(workshop: Any, tmp_path: Path) -> None:
    for number, config in enumerate((TRANSFORMERS, TIMM, None)):
        place = tmp_path / str(number)
        place.mkdir()
        artifact = Artifact.read(folder(place, config, **weights(workshop, "one")))
        assert HuggingFace().load(artifact, workshop.arch("Net")).num_classes == 4


def test_transformers_are_refused_with_a_way_out(workshop: Any, tmp_path: Path) -> None:
    place = folder(tmp_path, TRANSFORMERS, **weights(workshop, "one"))
    (place / "modeling.py").write_text("raise SystemExit('executed')\n")
    with pytest.raises(UnsupportedModelError, match="ViTForImageClassification") as caught:
        HuggingFace().load(Artifact.read(place), None)
    assert "never run" in caught.value.why and "ONNX" in caught.value.hint


def test_without_any_description(workshop: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no architecture"):
        HuggingFace().load(Artifact.read(folder(tmp_path, None, **weights(workshop, "one"))), None)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["hf-hub:x/y", "../net", "net/../..", "os:system", "", 3, "net\n"])
def test_a_configuration_names_nothing_but_networks_of_timm(workshop: Any, tmp_path: Path, name: Any) -> None:
    place = folder(tmp_path, TIMM | {"architecture": name}, **weights(workshop, "one"))
    with pytest.raises(UsageError, match="timm has no classifier"):
        HuggingFace().load(Artifact.read(place), None)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    "config",
    [
        [],
        TIMM | {"pretrained_cfg": 3},
        TIMM | {"mean": [0.5], "std": [0.0], "pretrained_cfg": {"mean": [0.5], "std": [0.0]}},
        TIMM | {"pretrained_cfg": {"mean": [0.5] * 3}},
        TIMM | {"pretrained_cfg": {"mean": ["a"], "std": [1]}},
        TIMM | {"pretrained_cfg": {"mean": [float("nan")], "std": [1]}},
        TIMM | {"pretrained_cfg": {"input_size": [3, 10**9, 1]}},
        TIMM | {"pretrained_cfg": {"input_size": [3, 12]}},
        TIMM | {"model_args": {"img_size": 10**9}},
        TIMM | {"model_args": {"img_size": "12"}},
        TIMM | {"model_args": {"img_size": [12, 12, 12]}},
        TIMM | {"model_args": {"global_pool": "__class__"}},
        TIMM | {"model_args": {"norm_layer": "os.system"}},
        TIMM | {"model_args": [1]},
    ],
)
def test_damaged_configurations(workshop: Any, tmp_path: Path, config: Any) -> None:
    artifact = Artifact.read(folder(tmp_path, config, **weights(workshop, "one")))
    with pytest.raises(ArtifactError):
        HuggingFace().load(artifact, None)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b""])
def test_configurations_that_are_no_json(workshop: Any, tmp_path: Path, text: bytes) -> None:
    place = folder(tmp_path, TIMM, **weights(workshop, "one"))
    (place / "config.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        HuggingFace().load(Artifact.read(place), None)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    "places", [None, {"conv.weight": 3}, {"conv.weight": "../x.safetensors"}, {"nothing": "a.safetensors"}]
)
def test_an_index_that_leads_nowhere(workshop: Any, tmp_path: Path, places: Any) -> None:
    files = sharded(workshop.net("Net").state_dict())
    files["model__safetensors__index__json"] = json.dumps({"weight_map": places}).encode()
    with pytest.raises(ArtifactError, match="damaged"):
        HuggingFace().load(Artifact.read(folder(tmp_path, TIMM, **files)), None)


def test_a_pointer_in_place_of_the_weights(workshop: Any, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(ArtifactError, match="Git LFS"):
        HuggingFace().load(Artifact.read(folder(tmp_path, TIMM, model__safetensors=pointer)), None)


def test_other_folders_are_not_accepted(tmp_path: Path) -> None:
    assert not HuggingFace().accepts(Artifact.read(folder(tmp_path, TIMM, saved_model__pb=b"x")))
    assert not HuggingFace().accepts(Artifact(tmp_path / "x", b"{}", "", {"model.safetensors": b""}))
