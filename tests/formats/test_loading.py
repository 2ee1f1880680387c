"""Folders and companions on their way to a scan, and what a file says of its own images."""

import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.errors import ArtifactError, UnsafeModelError
from backdoorscan.formats import convention as conventions
from backdoorscan.formats.loading import load_model, read_artifact
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import LoadedNetwork, Loader
from backdoorscan.registry import Registry

MEAN, STD = (0.3, 0.3, 0.3), (0.01, 0.01, 0.01)
IMAGENET = InputConvention(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Listing(Loader):
    """Text files: each line names a companion."""

    id, summary, suffix = "listing", "Text files.", ".txt"

    def accepts(self, artifact: Artifact) -> bool:
        return artifact.data.startswith(b"listing\n")

    def companions(self, artifact: Artifact) -> Sequence[str]:
        return artifact.data.decode().splitlines()[1:]

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        assert dict(artifact.parts) == {"w.bin": b"weights"}
        return LoadedNetwork(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), (1, 2, 2), "NCHW", 2)

    def write(self, artifact: Artifact, weights: Any, path: Path, arch: str | None = None) -> None:
        raise NotImplementedError


class Module:
    @staticmethod
    @hookimpl
    def backdoorscan_loaders() -> list[type[Loader]]:
        return [Listing]


@pytest.fixture
def registry(registry_of: Callable[..., Registry]) -> Registry:
    made = registry_of()
    made.add(lambda: Module, "listing", "listing", "1")
    return made


def test_companions_are_read_and_hashed(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "m.txt").write_text("listing\nw.bin")
    (tmp_path / "w.bin").write_bytes(b"weights")
    artifact = read_artifact(tmp_path / "m.txt", registry)
    assert dict(artifact.parts) == {"w.bin": b"weights"}
    assert artifact.sha256 != Artifact.read(tmp_path / "m.txt").sha256
    loaded = load_model(tmp_path / "m.txt", None, registry=registry)
    assert loaded.facts["sha256"] == artifact.sha256
    (tmp_path / "w.bin").write_bytes(b"weighty")
    assert read_artifact(tmp_path / "m.txt", registry).sha256 != artifact.sha256


def test_companions_elsewhere_are_refused(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "m.txt").write_text("listing\n../w.bin")
    (tmp_path / "w.bin").write_bytes(b"weights")
    for read in (read_artifact, lambda path, found: load_model(path, None, registry=found)):
        with pytest.raises(UnsafeModelError, match=r"w\.bin"):
            read(tmp_path / "m" / "m.txt", registry)


def test_a_file_without_companions_keeps_its_digest(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "m.txt").write_text("anything")
    assert read_artifact(tmp_path / "m.txt", registry) == Artifact.read(tmp_path / "m.txt")


def test_a_folder_without_a_model(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ArtifactError, match="is a folder") as caught:
        load_model(tmp_path, None, registry=registry)
    assert "config.json" in caught.value.hint


def logits_under(right: InputConvention) -> Callable[[InputConvention, torch.Tensor], torch.Tensor]:
    """A network that tells apart pixels near 30 % grey, if it is fed as ``right``."""

    def logits(tried: InputConvention, pixels: torch.Tensor) -> torch.Tensor:
        seen = tried.apply(pixels)[:, :, 0, 0].mean(1)
        low, high = (right.apply(torch.full((1, 3, 1, 1), value)).mean() for value in (0.29, 0.31))
        return torch.stack([-((seen - low) ** 2), -((seen - high) ** 2)], 1)

    return logits


def grey(count: int = 60) -> LabelledImages:
    labels = np.arange(count) % 2
    pixels = np.broadcast_to((0.29 + 0.02 * labels).reshape(-1, 1, 1, 1), (count, 3, 2, 2)).astype(np.float32)
    return LabelledImages(pixels, labels, "grey")


def test_what_the_file_says_is_tried_first() -> None:
    own = InputConvention(mean=MEAN, std=STD)
    tried = conventions.candidates(3, None, own)
    assert tried[0] == own and len(tried) == len(conventions.candidates(3, None)) + 1
    assert conventions.candidates(3, None, IMAGENET)[0] == IMAGENET
    assert len(conventions.candidates(3, None, IMAGENET)) == len(conventions.candidates(3, None))
    assert conventions.candidates(3, InputConvention(0, 255), own) == [InputConvention(0, 255)]


def test_what_the_file_says_wins_among_equals() -> None:
    def blind(_: InputConvention, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((pixels[:, 0, 0, 0] > 0.3).long(), 2).float()

    own = InputConvention(mean=MEAN, std=STD)
    chosen, _ = conventions.find(blind, grey(), conventions.candidates(3, None, own), 2, 0, own)
    assert chosen.convention == own


def test_a_file_that_is_wrong_about_its_images_is_not_believed() -> None:
    wrong = InputConvention(mean=(0.9,) * 3, std=(0.5,) * 3)
    right = InputConvention(0, 255)
    chosen, _ = conventions.find(logits_under(right), grey(), conventions.candidates(3, None, wrong), 2, 0, wrong)
    assert chosen.convention == right


def test_a_folder_tells_size_and_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    package: Any = types.ModuleType("timm")
    package.create_model = lambda name, pretrained: net
    package.is_model = lambda name: name == "net"
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    config = {"architecture": "net", "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 5, 6]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_model(tmp_path, None, registry=registry)
    assert loaded.classifier.input_shape == (3, 5, 6) and loaded.facts["format"] == "huggingface"
    assert (loaded.facts["mean"], loaded.facts["std"]) == (list(MEAN), list(STD))
    assert "input_range_assumed" not in loaded.facts
