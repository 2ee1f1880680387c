import gzip
import random

import h5py
import numpy as np
import pytest

from backdoorscan.errors import ImagesError
from backdoorscan.formats import sandbox
from backdoorscan.formats.images import load_images, reading


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clean.h5"


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_csaw_layout(path, images, labels, dtype):
    write(path, data=images.astype(dtype), label=labels.astype(np.float64))
    loaded = load_images(path)
    assert loaded.pixels.dtype == np.uint8
    assert np.array_equal(loaded.pixels, images)
    assert loaded.labels.tolist() == labels.tolist()
    assert loaded.source == str(path)


def test_channels_last_in_groups(path, images, labels):
    write(path, test__images=images.transpose(0, 2, 3, 1), test__labels=labels, train__images=images[:1])
    assert np.array_equal(load_images(f"{path}#test").pixels, images)
    assert np.array_equal(load_images(path).pixels, images)


def test_splits(path, images, labels, refused):
    write(path, x_test=images[:2], y_test=labels[:2], x_train=images, y_train=labels)
    assert len(load_images(f"{path}#test")) == 2
    assert load_images(f"{path}#train").source == f"{path}#train"
    refused(path, "several sets", f"'{path}#test'")
    refused(f"{path}#trian", "no 'trian'", "Did you mean 'train'?")


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}])
def test_compressed(path, images, labels, options):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=images, chunks=(2, 3, 5, 7), fletcher32=True, **options)
        file["label"] = labels
    assert np.array_equal(load_images(path).pixels, images)


def test_user_block_and_gzip(path, images, labels):
    with h5py.File(path, "w", userblock_size=512) as file:
        file["data"], file["label"] = images, labels
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert np.array_equal(load_images(path).pixels, images)


def test_links_are_refused(path, images, labels, refused, tmp_path):
    write(tmp_path / "other.h5", secret=images)
    for link in (h5py.ExternalLink(str(tmp_path / "other.h5"), "secret"), h5py.SoftLink("/label")):
        write(path, data=link, label=labels)
        refused(path, "'data' is a link")


def test_external_storage_is_refused(path, labels, refused, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(range(150)))
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (6, 5, 5), "u1", external=[(str(tmp_path / "secret"), 0, 150)])
        file["label"] = labels
    refused(path, "lie in other files")


def test_virtual_datasets_are_refused(path, labels, refused, tmp_path):
    layout = h5py.VirtualLayout((6, 5, 5), "u1")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (6, 5, 5))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("data", layout)
        file["label"] = labels
    refused(path, "lie in other files")


def test_declared_sizes_are_bounded(path, labels, refused):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (6, 2**20, 2**20), "u1", chunks=(1, 64, 64))
        file["label"] = labels
    refused(path, "too large", "'data'")


def test_chunks_are_bounded(path, images, labels, refused, monkeypatch):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=images[:, 0], chunks=(64, 64, 64), maxshape=(None,) * 3, compression="gzip")
        file["label"] = labels
    monkeypatch.setattr(reading, "MAX_BYTES", 100_000)
    monkeypatch.setattr(sandbox, "available", lambda: False)  # a child has its own modules
    assert path.stat().st_size < 100_000
    refused(path, "A chunk of '/data'")


def test_a_group_that_contains_itself(path, images, labels, refused):
    with h5py.File(path, "w") as file:
        group = file.create_group("group")
        group["again"] = group
        group["and_again"] = group
    refused(path, "more than 2,000 entries")


def test_never_filled(path, labels, refused):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (6, 5, 5), "u1")
        file["label"] = labels
    refused(path, "never filled")


def test_unsupported_filter(path, images, labels, refused):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=images, scaleoffset=0)
        file["label"] = labels
    refused(path, "compressed in a way", "[6]")


def test_strings_and_empty(path, images, labels, refused):
    write(path, data=images, label=["cat"] * 6)
    refused(path, "'label' does not hold numbers")
    write(path, data=images, label=h5py.Empty("f8"))
    refused(path, "")
    write(path, data=images[:0], label=labels[:0])
    refused(path, "holds no images")
    write(path)
    refused(path, "It holds no arrays")


def test_counts_differ(path, images, labels, refused):
    write(path, data=images, label=labels[:4])
    refused(path, "6 images but labels of shape (4,)")


def test_a_model_instead_of_images(path, refused):
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = "{}"
    refused(path, "is a Keras model")


def test_datasets_are_listed(path, images, refused):
    write(path, faces=images, masks=images)
    refused(path, "faces 6×3×5×7 uint8", "masks 6×3×5×7 uint8")


def test_truncated(path, images, labels, refused):
    write(path, data=images, label=labels)
    content = path.read_bytes()
    for length in (9, 50, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "cannot be read as an HDF5 file")


def test_damage_gives_images_or_one_error(path, images, labels):
    write(path, data=images, label=labels)
    content = path.read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[chance.randrange(16, 900)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_images(path)
        except ImagesError as error:
            assert str(error).count("\n") <= 2
