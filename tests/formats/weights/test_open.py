"""Opening hostile and damaged files."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.weights.checkpoint import kind_of
from backdoorscan.formats.weights.loader import Safetensors, TorchStateDict

LEGACY = {"_use_new_zipfile_serialization": False}


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def loader_of(artifact: Any) -> Any:
    accepting = [loader for loader in (TorchStateDict(), Safetensors()) if loader.accepts(artifact)]
    assert len(accepting) == 1
    return accepting[0]


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_payload_is_refused_and_not_run(workshop: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    touched = tmp_path / "touched"
    artifact = workshop.save({"state_dict": workshop.net("Net").state_dict(), "x": Touch(touched)}, **options)
    with pytest.raises(UnsafeModelError) as caught:
        loader_of(artifact).load(artifact, workshop.arch("Net"))
    assert not touched.exists()
    assert "run code" in caught.value.why and "state_dict()" in caught.value.hint
    with pytest.raises(UnsafeModelError):
        loader_of(artifact).write(artifact, {}, tmp_path / "copy.pt")
    assert not touched.exists() and not (tmp_path / "copy.pt").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_is_refused(workshop: Any, tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "touched"
    artifact = workshop.put(pickle.dumps(Touch(touched), protocol))
    with pytest.raises(UnsafeModelError, match="plain pickle"):
        loader_of(artifact).load(artifact, None)
    assert not touched.exists()


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_pickled_module_is_refused(workshop: Any, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        artifact = workshop.save(nn.Sequential(nn.Linear(2, 2)), **options)
    with pytest.raises(UnsafeModelError, match=r"torch\.nn\.modules\.container\.Sequential"):
        loader_of(artifact).load(artifact, "torch.nn:Identity")


def test_torchscript_is_refused(workshop: Any) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    artifact = workshop.put(buffer.getvalue())
    with pytest.raises(UnsafeModelError, match="TorchScript"):
        loader_of(artifact).load(artifact, None)


def test_an_exported_program_is_left_to_its_own_loader(workshop: Any) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("models/model.json", "archive_format", "data/weights/weight_0"):
            archive.writestr(f"archive/{name}", "{}")
    artifact = workshop.put(buffer.getvalue())
    assert kind_of(artifact.data) == "pt2" and not TorchStateDict().accepts(artifact)


def test_a_compressed_archive_is_refused(workshop: Any) -> None:
    plain = workshop.save({"w": torch.zeros(100_000)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(plain.path) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    artifact = workshop.put(buffer.getvalue())
    with pytest.raises(UnsupportedModelError, match="compressed"):
        loader_of(artifact).load(artifact, None)


def test_a_storage_larger_than_the_file_is_refused(workshop: Any) -> None:
    artifact = workshop.save({"w": torch.zeros(3)}, **LEGACY)
    data = artifact.data.replace(b"K\x03N", b"J\xff\xff\xff\x7fN")  # a storage of 2**31 - 1 numbers
    assert data != artifact.data
    broken = workshop.put(data)
    with pytest.raises(ArtifactError):
        loader_of(broken).load(broken, None)


def test_pickle_protocol_4_in_an_archive_is_explained(workshop: Any) -> None:
    artifact = workshop.save({"w": torch.zeros(3)}, pickle_protocol=4)
    with pytest.raises(ArtifactError, match="Unsupported operand"):
        loader_of(artifact).load(artifact, None)


@pytest.mark.parametrize("options", [{}, LEGACY])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_truncated_torch_files(workshop: Any, options: dict[str, Any], share: float) -> None:
    data = workshop.save(workshop.net("Net").state_dict(), **options).data
    artifact = workshop.put(data[: int(len(data) * share)])
    assert TorchStateDict().accepts(artifact)
    with pytest.raises(ArtifactError) as caught:
        TorchStateDict().load(artifact, workshop.arch("Net"))
    assert caught.value.why and "again" in caught.value.hint


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_truncated_safetensors(workshop: Any, share: float) -> None:
    data = safetensors.torch.save(workshop.net("Net").state_dict())
    artifact = workshop.put(data[: int(len(data) * share)])
    assert Safetensors().accepts(artifact)
    with pytest.raises(ArtifactError, match="truncated"):
        Safetensors().load(artifact, workshop.arch("Net"))


def test_damaged_files_never_surprise(workshop: Any) -> None:
    """Whatever bytes are exchanged, the answer is a network or an ``ArtifactError``."""
    generator = torch.Generator().manual_seed(0)
    for options in ({}, LEGACY):
        data = workshop.save(workshop.net("Tied").state_dict(), **options).data
        for _ in range(60):
            broken = bytearray(data)
            for place in torch.randint(20, min(len(data), 900), (3,), generator=generator).tolist():
                broken[place] ^= 0x55
            artifact = workshop.put(bytes(broken))
            try:
                TorchStateDict().load(artifact, workshop.arch("Tied"))
            except ArtifactError:
                continue


def test_other_formats_are_not_accepted(workshop: Any) -> None:
    keras = io.BytesIO()
    with zipfile.ZipFile(keras, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    for data in (
        keras.getvalue(),
        keras.getvalue()[:40],
        b"\x89HDF\r\n\x1a\n" + bytes(100),
        b"\x08\x07\x12\x07pytorch",
        b"P",
        b"PK\x03\x04",
        b"\x80",
        b"\x80\x02",
        b"\x80\x02\0\0\0\0\0\0[",
        b'{"class_name": "Sequential"}',
        b"\xff" * 8 + b"{}",
    ):
        artifact = workshop.put(data)
        assert not Safetensors().accepts(artifact)
        assert not TorchStateDict().accepts(artifact) or data == b"\x80\x02"


def test_a_safetensors_header_that_looks_like_a_pickle(workshop: Any) -> None:
    tensors = {"w": torch.ones(2)}
    for padding in range(700):
        data = safetensors.torch.save(tensors, {"note": "x" * padding})
        if data.startswith(b"\x80\x02"):
            break
    assert data[:2] == b"\x80\x02"
    assert kind_of(data) == "safetensors"
