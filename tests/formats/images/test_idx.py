import gzip
import struct

import numpy as np
import pytest

from backdoorscan.formats.images import load_images

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array, dtype="u1") -> bytes:
    header = struct.pack(">BBBB", 0, 0, CODES[dtype], array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(">" + dtype).tobytes()


@pytest.fixture
def grey(images):
    return images[:, 0]


def pair(folder, grey, labels, pack_images=False, pack_labels=False):
    path = folder / ("t10k-images-idx3-ubyte" + ".gz" * pack_images)
    path.write_bytes(gzip.compress(idx(grey)) if pack_images else idx(grey))
    other = folder / ("t10k-labels-idx1-ubyte" + ".gz" * pack_labels)
    other.write_bytes(gzip.compress(idx(labels)) if pack_labels else idx(labels))
    return path


@pytest.mark.parametrize("pack_images", [False, True])
@pytest.mark.parametrize("pack_labels", [False, True])
def test_reads_with_labels_beside(tmp_path, grey, labels, pack_images, pack_labels):
    loaded = load_images(pair(tmp_path, grey, labels, pack_images, pack_labels))
    assert np.array_equal(loaded.pixels[:, 0], grey)
    assert loaded.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8"])
def test_other_types_and_names(tmp_path, grey, labels, dtype):
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(grey, dtype))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(labels, dtype))
    assert np.array_equal(load_images(tmp_path / "t10k-images.idx3-ubyte").pixels[:, 0], grey)


def test_missing_labels(tmp_path, grey, labels, refused):
    path = pair(tmp_path, grey, labels)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    refused(path, "labels is missing", "t10k-labels-idx1-ubyte")
    path = path.rename(tmp_path / "digits")
    refused(path, "the word 'images'")


def test_labels_passed_as_images(tmp_path, grey, labels, refused):
    pair(tmp_path, grey, labels)
    refused(tmp_path / "t10k-labels-idx1-ubyte", "does not hold images", "found by themselves")


def test_labels_that_are_something_else(tmp_path, grey, labels, refused):
    path = pair(tmp_path, grey, labels)
    (tmp_path / "t10k-labels-idx1-ubyte").write_text("0,1,2")
    refused(path, "t10k-labels-idx1-ubyte is not an idx file")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:3]))
    refused(path, "6 images but labels of shape (3,)")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels)[:-1])
    refused(path, "t10k-labels-idx1-ubyte is damaged")


def test_wrong_length(tmp_path, grey, labels, refused):
    path = pair(tmp_path, grey, labels)
    for content in (idx(grey)[:-1], idx(grey) + b"\0", idx(grey)[:10], idx(grey)[:4]):
        path.write_bytes(content)
        refused(path, "is damaged")


def test_declared_shape_is_bounded(tmp_path, grey, labels, refused):
    path = pair(tmp_path, grey, labels)
    path.write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 28))
    refused(path, "too large")


def test_unpacked_size_is_bounded(tmp_path, labels, refused, small_limit):
    path = pair(tmp_path, np.zeros((6, 2000, 2000)), labels, pack_images=True)
    path.write_bytes(gzip.compress(bytes(20_000)))
    refused(path, "too large", "unpacks to")


def test_damaged_gzip(tmp_path, grey, labels, refused):
    path = pair(tmp_path, grey, labels, pack_images=True)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refused(path, "cannot be read as a gzip file")
    path.write_bytes(content[:30] + b"\xff" * 20 + content[50:])
    refused(path, "cannot be read as a gzip file")
    path.write_bytes(gzip.compress(b""))
    refused(path, "unpacks to nothing")


def test_no_splits(tmp_path, grey, labels, refused):
    path = pair(tmp_path, grey, labels)
    refused(f"{path}#test", "there is no 'test'", "An idx file holds one set")


def test_empty(tmp_path, grey, labels, refused):
    refused(pair(tmp_path, grey[:0], labels[:0]), "holds no images")
