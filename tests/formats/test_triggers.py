"""Triggers as files: what is saved comes back, and hostile files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.errors import ImagesError
from backdoorscan.formats.triggers import load_triggers, save_triggers


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_what_is_saved_comes_back(suffix: str, tmp_path: Path, triple: Any) -> None:
    classifier, images, trigger = triple(2)
    save_triggers([trigger], tmp_path / f"t{suffix}")
    (finding,) = load_triggers(tmp_path / f"t{suffix}", classifier, images)
    torch.testing.assert_close(finding.trigger.mask, trigger.mask)
    torch.testing.assert_close(finding.trigger.pattern, trigger.pattern)
    assert finding.target_label == 2 and finding.attack_success_rate > 0.9


def external(path: Path) -> None:
    (path.parent / "secret").write_bytes(bytes(48))
    with h5py.File(path, "w") as file:
        file.create_dataset("mask", (1, 1, 3, 4), "f4", external=[(str(path.parent / "secret"), 0, 48)])


def vast(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("mask", (1, 1, 2**16, 2**16), "f4", chunks=(1, 1, 64, 64), compression="gzip")[0, 0, 0] = 1


def objects(path: Path) -> None:
    np.savez(path, mask=np.array([{}], object), allow_pickle=True)


def bomb(path: Path) -> None:
    np.savez_compressed(path, mask=np.zeros((1, 1, 3, 4), "f4"))
    data = bytearray(path.read_bytes())
    size = data.index(b"PK\x01\x02") + 24
    data[size : size + 4] = (2**31 + 2).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("write", [external, vast, objects, bomb])
def test_hostile_files(write: Any, tmp_path: Path, triple: Any) -> None:
    classifier, images, _ = triple(None)
    path = tmp_path / ("t.npz" if write in (objects, bomb) else "t.h5")
    write(path)
    assert path.stat().st_size < 2**22
    with pytest.raises(ImagesError) as caught:
        load_triggers(path, classifier, images)
    assert str(path) in caught.value.what
