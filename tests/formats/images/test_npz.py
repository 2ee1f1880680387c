import io
import random
import zipfile

import numpy as np
import pytest

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images import load_images


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clean.npz"


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array))
    return stream.getvalue()


def archive(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name + ".npy", content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "names", [("data", "label"), ("X", "y"), ("images", "labels"), ("x_test", "y_test"), ("a", "b")]
)
def test_reads(path, images, labels, save, names):
    save(path, **dict(zip(names, (images, labels), strict=True)))
    loaded = load_images(path)
    assert np.array_equal(loaded.pixels, images)
    assert loaded.labels.tolist() == labels.tolist()


def test_fortran_order_one_hot_and_floats(path, images, labels):
    fractions = np.asfortranarray(images / 255)
    np.savez(path, x=fractions, y=np.eye(3)[labels])
    loaded = load_images(path)
    assert loaded.pixels.dtype == np.float32
    assert np.array_equal(loaded.pixels, (images / 255).astype(np.float32))
    assert loaded.labels.tolist() == labels.tolist()


def test_splits(path, images, labels, refused):
    np.savez(path, x_test=images[:2], y_test=labels[:2], x_train=images, y_train=labels)
    assert len(load_images(f"{path}#test")) == 2
    assert len(load_images(f"{path}#train")) == 6
    refused(path, "several sets of images: test, train", "#test'")
    refused(f"{path}#val", "there is no 'val'", "It holds test, train")
    refused(f"{path}#", "does not exist")


def test_a_hash_in_the_name_itself(tmp_path, images, labels):
    np.savez(tmp_path / "clean#1.npz", x=images, y=labels)
    assert len(load_images(tmp_path / "clean#1.npz")) == 6
    assert len(load_images(f"{tmp_path / 'clean#1.npz'}#x")) == 6


def test_limit_is_balanced_and_seeded(path):
    pixels = np.arange(100 * 16, dtype=np.uint16).reshape(100, 4, 4).astype(np.uint8)
    np.savez(path, x=pixels, y=np.repeat([0, 1], [90, 10]))
    loaded = load_images(path, limit=8, seed=1)
    assert np.bincount(loaded.labels).tolist() == [4, 4]
    assert loaded.sha256 == load_images(path, limit=8, seed=1).sha256
    assert loaded.sha256 != load_images(path, limit=8, seed=2).sha256
    assert len(load_images(path, limit=1000)) == 100


def test_limit_must_be_positive(path, images, labels, refused):
    np.savez(path, x=images, y=labels)
    refused(path, "sample of 0 images", limit=0)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_pickles_are_refused(path, images, refused):
    objects = np.empty(6, object)
    objects[:] = [Bomb() for _ in range(6)]
    np.savez(path, x=images, y=objects)
    refused(path, "'y' does not hold numbers", "pickles")


def test_text_labels(path, images, refused):
    np.savez(path, x=images, y=["cat"] * 6)
    refused(path, "'y' does not hold numbers", "<U3")


def test_declared_shape_is_bounded(path, labels, refused):
    header = npy(np.zeros((6, 5, 5), np.uint8)).replace(b"(6, 5, 5)", b"(6,5,9e9)")
    archive(path, x=header, y=npy(labels))
    refused(path, "cannot be read as a NumPy archive")
    archive(path, x=npy(np.zeros((6, 111111, 1), np.uint8)).replace(b"111111, 1", b"111111111"), y=npy(labels))
    refused(path, "'x' is damaged")
    archive(path, x=npy(np.zeros((6, 1111111, 1), np.uint8)).replace(b"1111111, 1", b"9999999999"), y=npy(labels))
    refused(path, "too large")


def test_unpacked_size_is_bounded(path, labels, refused, small_limit):
    archive(path, x=npy(np.zeros((6, 50, 50), np.uint8)), y=npy(labels))
    assert path.stat().st_size < small_limit
    refused(path, "too large", "limit is 10,000")
    archive(path, x=npy(np.zeros((6, 5, 5), np.uint8)) + bytes(20_000), y=npy(labels))
    refused(path, "too large")


def test_member_of_wrong_length(path, images, labels, refused):
    archive(path, x=npy(images)[:-1], y=npy(labels))
    refused(path, "'x' is damaged")
    archive(path, x=npy(images) + b"\0", y=npy(labels))
    refused(path, "'x' is damaged")


def test_other_archives(path, images, refused):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0/picture.png", b"")
    refused(path, "not one of NumPy arrays")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path, "not one of NumPy arrays")
    archive(path, **{f"a{i}": b"" for i in range(1001)})
    refused(path, "more than 1000 members")
    archive(path, x=b"no array")
    refused(path, "cannot be read as a NumPy archive")


def test_structures_and_later_versions(path, images, refused):
    content = bytearray(npy(images))
    content[6] = 3
    archive(path, x=bytes(content), y=npy([0]))
    refused(path, "version (3, 0)")
    archive(path, x=npy(images), y=npy(np.zeros(6, [("a", "u1")])))
    refused(path, "'y' does not hold numbers")


def test_version_2_headers(path, images, labels):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, images, version=(2, 0))
    archive(path, x=stream.getvalue(), y=npy(labels))
    assert np.array_equal(load_images(path).pixels, images)


def test_headers_of_python_2(path, images, labels):
    archive(path, x=npy(images).replace(b"(6, 3, 5, 7)", b"(6L,3, 5, 7)"), y=npy(labels))
    assert np.array_equal(load_images(path).pixels, images)


def test_truncated(path, images, labels, refused):
    np.savez(path, x=images, y=labels)
    content = path.read_bytes()
    for length in (5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "cannot be read as a NumPy archive")


def test_damage_gives_images_or_one_error(path, images, labels):
    np.savez_compressed(path, x=images, y=labels)
    content = path.read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(4, len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_images(path)
        except ImagesError as error:
            assert str(error).count("\n") <= 2
