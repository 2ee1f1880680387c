"""`.keras` archives: plain ones, broken ones, and ones that are made to mislead."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.keras.loader import KerasH5, KerasV3
from backdoorscan.formats.keras.parse import parse

KERNEL = np.arange(12, dtype="float32").reshape(4, 3)
VARS = "layers/dense/vars"
INPUT = {"class_name": "InputLayer", "module": "keras.layers", "config": {"name": "in", "batch_shape": [None, 4]}}
DENSE = {"class_name": "Dense", "module": "keras.layers", "config": {"name": "any", "units": 3}}
METADATA = json.dumps({"keras_version": "3.15.1", "date_saved": "2026-01-01@00:00:00"})


def stack(*layers):
    return json.dumps({"class_name": "Sequential", "config": {"name": "s", "layers": [INPUT, *layers]}})


def weights_file(edit=lambda file: None):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file[f"{VARS}/0"], file[f"{VARS}/1"] = KERNEL, np.ones(3, "float32")
        edit(file)
    return buffer.getvalue()


def zipped(members, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def archive(config=None, weights=None, method=zipfile.ZIP_STORED, **more):
    members = {"metadata.json": METADATA, "config.json": config or stack(DENSE)}
    return zipped({**members, "model.weights.h5": weights or weights_file(), **more}, method)


def read(data, name="m.keras"):
    artifact = Artifact(Path(name), data, "")
    assert KerasV3().accepts(artifact)
    return KerasV3().load(artifact, None)


def refused(data, match, error=UnsafeModelError):
    with pytest.raises(error, match=match) as caught:
        read(data)
    assert caught.value.what and caught.value.hint
    return caught.value


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_plain_archive(method):
    """Read from memory alone: there is no such file."""
    loaded = read(archive(method=method), "there/is/no/such/file")
    assert (loaded.num_classes, loaded.input_shape) == (3, (4,))
    assert loaded.details["keras_version"] == "3.15.1"
    np.testing.assert_array_equal(loaded.network.any.weight.detach().numpy(), KERNEL.T)


def test_written_to_a_stream():
    """A program that cannot go back writes sizes behind the members."""
    buffer = io.BytesIO()
    buffer.seekable = lambda: False
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {"config.json": stack(DENSE), "model.weights.h5": weights_file()}.items():
            file.writestr(name, content)
    assert read(buffer.getvalue()).details["keras_version"] == ""


def test_parsed_is_plain_data():
    parsed = parse(archive(), "m.keras")
    again = pickle.loads(pickle.dumps(parsed))
    assert again.config == parsed.config and again.numbered
    assert [(group.layer, [weight.name for weight in group.weights]) for group in again.groups] == [
        ("layers/dense", ["0", "1"])
    ]


def test_told_by_content():
    assert KerasV3().accepts(Artifact(Path("m.bin"), archive(), ""))
    assert not KerasH5().accepts(Artifact(Path("m.h5"), archive(), ""))
    assert not KerasV3().accepts(Artifact(Path("m.keras"), weights_file(), ""))
    for members in ({"archive/data.pkl": b""}, {"readme.txt": b""}, {}):
        assert not KerasV3().accepts(Artifact(Path("m.keras"), zipped(members), ""))
    assert KerasV3().accepts(Artifact(Path("m"), zipped({"assets/words": b"", "config.json": b"{}"}), ""))


def test_without_a_needed_member():
    for name in ("config.json", "model.weights.h5"):
        members = {"metadata.json": METADATA, "config.json": stack(DENSE), "model.weights.h5": weights_file()}
        del members[name]
        refused(zipped({**members, "model.weights.npz": b""}), name, UnsupportedModelError)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "assets/../../evil", "..\\evil", "C:/evil", "C:\\evil", "assets\\evil"]
)
def test_names_that_leave_the_archive(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(archive(**{name: b"x"}), "leaves the archive")
    assert list(tmp_path.parent.rglob("*evil*")) == []


def test_two_members_of_one_name():
    buffer = io.BytesIO(archive())
    with zipfile.ZipFile(buffer, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("config.json", stack({**DENSE, "config": {"name": "other", "units": 3}}))
    refused(buffer.getvalue(), "two files of one name")


def entry_at(data, name):
    """Where the central directory's entry for a member begins."""
    return data.rindex(name.encode()) - 46


def patched(data, position, form, value):
    changed = bytearray(data)
    struct.pack_into(form, changed, position, value)
    return bytes(changed)


def test_encrypted():
    data = archive()
    refused(patched(data, entry_at(data, "config.json") + 8, "<H", 1), "encrypted")


def test_unknown_compression():
    refused(archive(method=zipfile.ZIP_BZIP2), "method 12", UnsupportedModelError)


def test_two_names_for_one_member():
    data = archive()
    position = data.index(b"config.json")
    refused(data[:position] + b"CONFIG.json" + data[position + 11 :], "is not there", ArtifactError)


def test_member_within_a_member():
    """The weights lie inside another member, where another program would not look for them."""
    inner = zipped({"model.weights.h5": weights_file()})
    start = inner.index(b"PK\x01\x02")
    outer = zipped({"config.json": stack(DENSE), "assets/x": inner[:start]})
    directory = outer.index(b"PK\x01\x02", outer.index(b"assets/x") + start)
    within = outer.index(b"PK\x03\x04", outer.index(b"assets/x"))
    listed = outer[directory:-22] + patched(inner[start:-22], 42, "<I", within)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, len(listed), directory, 0)
    data = outer[:directory] + listed + end
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    refused(data, "lies over another")


@pytest.mark.parametrize("change", [lambda data: data + b"more", lambda data: data[:-2] + b"\x04\0more"])
def test_bytes_behind_the_archive(change):
    refused(change(archive()), "broken zip", ArtifactError)


def test_bytes_before_the_archive():
    assert not KerasV3().accepts(Artifact(Path("m.keras"), b"#!/bin/sh\n" + archive(), ""))


def test_more_members_than_any_model_has():
    refused(archive(**{f"assets/{number}": b"" for number in range(1000)}), "1003 files")


def test_hdf5_and_zip_at_once():
    """Keras goes by the name: as model.h5 it would load one model, as model.keras another."""
    padding = b" " * (512 - len(zipped({"metadata.json": b""}).partition(b"PK\x01\x02")[0]))
    for data in (
        weights_file() + archive(),
        zipped({"metadata.json": padding + weights_file(), "config.json": stack(DENSE)}),
    ):
        for loader in (KerasH5(), KerasV3()):
            artifact = Artifact(Path("m.keras"), data, "")
            if loader.accepts(artifact):
                with pytest.raises(UnsafeModelError, match="at once"):
                    loader.load(artifact, None)
        assert KerasH5().accepts(artifact)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_bomb_by_ratio(member):
    """80 MiB of zeros in 80 KiB."""
    data = zipped(
        {"config.json": stack(DENSE), "model.weights.h5": weights_file(), member: bytes(80 * 2**20)},
        zipfile.ZIP_DEFLATED,
    )
    assert len(data) < 2**18
    assert "expands" in str(refused(data, member))


def test_bomb_by_size():
    """A few bytes more than 2 GiB, said to be stored as they are."""
    data = archive()
    position = entry_at(data, "model.weights.h5")
    for field in (20, 24):
        data = patched(data, position + field, "<I", 2**31 + 1)
    refused(data, "large")


def test_bomb_that_lies():
    """The directory says 100 bytes; no more than that is made."""
    data = zipped({"config.json": bytes(80 * 2**20), "model.weights.h5": weights_file()}, zipfile.ZIP_DEFLATED)
    data = patched(data, entry_at(data, "config.json") + 24, "<I", 100)
    refused(data, "damaged", ArtifactError)


def test_zip_within_the_zip():
    refused(archive(weights=archive()), "not an HDF5 file", ArtifactError)
    refused(archive(config=archive().decode("latin1")), "not valid JSON", ArtifactError)


def linked(file, make):
    del file[f"{VARS}/0"]
    make(file)


def virtual(file):
    layout = h5py.VirtualLayout((4, 3), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (4, 3))
    file.create_virtual_dataset(f"{VARS}/0", layout)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda file: file.__setitem__(f"{VARS}/0", h5py.ExternalLink("/etc/passwd", "/x")), "link"),
        (lambda file: file.__setitem__(f"{VARS}/0", h5py.SoftLink("/layers/dense/vars/1")), "link"),
        (lambda file: file.__setitem__("optimizer", h5py.ExternalLink("/etc/passwd", "/")), "optimizer"),
        (lambda file: file.create_dataset(f"{VARS}/0", (4, 3), "f4", external=[("/etc/passwd", 0, 48)]), "external"),
        (virtual, "virtual"),
        (lambda file: file.create_dataset(f"{VARS}/0", (2**16, 2**16), "f4"), "declares"),
        (lambda file: file.create_dataset(f"{VARS}/0", (2**16, 2**16), "f4", chunks=(2**10, 2**10)), "declares"),
        (lambda file: file.__setitem__(f"{VARS}/0", "text"), "numbers"),
    ],
)
def test_weights_that_reach_out(make, match):
    refused(archive(weights=weights_file(lambda file: linked(file, make))), match)


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: linked(file, lambda file: None),
        lambda file: file.__setitem__(f"{VARS}/2", np.ones(3)),
        lambda file: file.move(f"{VARS}/1", f"{VARS}/bias"),
        lambda file: file.move("layers/dense", "layers/dense_1"),
        lambda file: file.move("layers", "elsewhere"),
    ],
)
def test_weights_that_do_not_fit(edit):
    assert (
        "layers/dense" in refused(archive(weights=weights_file(edit)), "weights of the layer 'any'", ArtifactError).why
    )


def test_weights_of_another_shape():
    assert "(4, 4)" in refused(archive(config=stack({**DENSE, "config": {"units": 4}})), "shape", ArtifactError).why


def test_group_that_holds_itself():
    data = archive(weights=weights_file(lambda file: file.__setitem__("layers/dense/loop", file["layers"])))
    assert read(data).num_classes == 3


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_truncated(part):
    data = archive(method=zipfile.ZIP_DEFLATED)
    refused(data[: int(len(data) * part)], "broken zip", ArtifactError)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bits(method):
    """Whatever is damaged, the answer is the model or one clear error."""
    data = archive(method=method)
    rng = np.random.default_rng(0)
    read_anyway = 0
    for _ in range(60):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            broken[position] ^= 1 << int(rng.integers(0, 8))
        artifact = Artifact(Path("m.keras"), bytes(broken), "")
        try:
            loaded = KerasV3().load(artifact, None)
        except ArtifactError as error:
            assert error.what
        else:
            read_anyway += 1
            np.testing.assert_array_equal(loaded.network.any.weight.detach().numpy(), KERNEL.T)
    assert read_anyway < 20


def test_flipped_bits_in_the_weights():
    """With a checksum that fits: whoever damages a file on purpose makes it fit."""
    weights = weights_file()
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(weights)
        for position in rng.integers(0, len(weights), 6):
            broken[position] = int(rng.integers(0, 256))
        try:
            read(archive(weights=bytes(broken)))
        except ArtifactError as error:
            assert error.what


@pytest.mark.parametrize(
    "config, match, error",
    [
        ("{", "not valid JSON", ArtifactError),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON", ArtifactError),
        ('{"class_name": "Sequential", "config": ' + "[" * 500 + "]" * 500 + "}", "deep", UnsafeModelError),
        (b"\xff\xfe", "neither", ArtifactError),
        ('{"class_name": "MyNet", "config": {}}', "MyNet", UnsupportedModelError),
        (stack({"class_name": "Mine", "config": {"name": "m"}}), "'m'", UnsupportedModelError),
        (stack({**DENSE, "module": "os"}), "custom", UnsupportedModelError),
        (stack({**DENSE, "registered_name": "my>Dense"}), "custom", UnsupportedModelError),
    ],
)
def test_wrong_architectures(config, match, error):
    caught = refused(archive(config=config), ".", error)
    assert match in str(caught)


def test_hundred_thousand_layers():
    layers = [{"class_name": "Activation", "config": {"name": f"a{i}", "activation": "relu"}} for i in range(100_000)]
    refused(archive(config=stack(*layers)), "layers")


def test_lambda_is_never_run(keras, tmp_path):
    """Wherever it stands: in the line, in an inner model, or in a branch that leads nowhere."""
    touched = tmp_path / "touched"
    evil = keras.layers.Lambda(lambda x, place=str(touched): (Path(place).touch(), x)[1], output_shape=(4,))
    model = keras.Sequential([keras.Input((4,)), keras.Sequential([keras.Input((4,)), evil]), keras.layers.Dense(3)])
    model.save(tmp_path / "m.keras")
    touched.unlink(missing_ok=True)
    refused((tmp_path / "m.keras").read_bytes(), "is a Lambda")
    with zipfile.ZipFile(tmp_path / "m.keras") as file:
        inner = json.loads(file.read("config.json"))["config"]["layers"][1]
    dead = {**inner, "name": "dead", "inbound_nodes": []}
    refused(archive(config=stack({**dead}, DENSE)), "is a Lambda")
    assert not touched.exists()


def test_checksum_is_checked():
    data = archive()
    position = data.index(KERNEL.tobytes())
    changed = data[:position] + b"\x01" + data[position + 1 :]
    assert zlib.crc32(changed) != zlib.crc32(data)
    refused(changed, "damaged", ArtifactError)
