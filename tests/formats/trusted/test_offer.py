"""``--trust`` is offered, and tried, only where it could help: links, bombs and damage stay what they are."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch

from backdoorscan.errors import ArtifactError


def _link(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = h5py.ExternalLink("other.h5", "/weights")


def _many_layers(path: Path) -> None:
    dense = {"class_name": "Dense", "config": {"name": "d", "units": 1}}
    config = {"class_name": "Sequential", "config": {"name": "m", "layers": [dense] * 20_000}}
    with h5py.File(path, "w", track_order=True) as file:
        file.create_group("model_weights").attrs["layer_names"] = []
        text = json.dumps(config)
        for part, start in enumerate(range(0, len(text), 60_000)):
            file.attrs[f"model_config{part}"] = text[start : start + 60_000]


def _damaged(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = [0.0] * 1000
    path.write_bytes(path.read_bytes()[:1000])


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", b" " * 70 * 2**20)
        archive.writestr("model.weights.h5", b"")


def _compressed(path: Path) -> None:
    torch.save({"weight": torch.zeros(10, 192)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("write", [_link, _many_layers, _damaged, _bomb, _compressed])
def test_what_no_conversion_overcomes(
    write: Callable[[Path], None], read: Callable[..., object], tmp_path: Path
) -> None:
    write(tmp_path / "m")
    with pytest.raises(ArtifactError) as refused:
        read(tmp_path / "m", trust=False)
    assert "--trust" not in str(refused.value)
    with pytest.raises(ArtifactError) as trusted:
        read(tmp_path / "m", trust=True)
    assert str(trusted.value) == str(refused.value)
