import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from backdoorscan.formats.images import load_images


def test_content_tells_the_format(tmp_path, images, labels):
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    (tmp_path / "a.npz").rename(tmp_path / "a.h5")
    assert np.array_equal(load_images(tmp_path / "a.h5").pixels, images)


def test_digest_is_the_same_for_every_format(tmp_path, images, labels):
    import h5py

    np.savez(tmp_path / "a.npz", x=images, y=labels)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"], file["label"] = images.astype(np.float64), labels.astype(np.float64)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "folder" / str(label) / f"{i}.png")
    assert load_images(tmp_path / "a.npz").sha256 == load_images(tmp_path / "a.h5").sha256
    order = np.argsort(labels, kind="stable")
    assert load_images(tmp_path / "folder").sha256 == load_images(tmp_path / "a.npz").take(order).sha256


def test_missing(tmp_path, images, labels, refused):
    np.savez(tmp_path / "clean.npz", x=images, y=labels)
    refused(tmp_path / "claen.npz", "does not exist", "Did you mean 'clean.npz'?")
    refused(f"{tmp_path / 'claen.npz'}#test", "does not exist", "Did you mean 'clean.npz'?")
    refused(tmp_path / "no" / "such" / "folder", "does not exist")
    refused("", "name of the images is empty")
    refused("#test", "does not exist")
    refused(tmp_path / ("a" * 300), "cannot be read", "too long")


def test_not_regular(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_empty_file(tmp_path, refused):
    (tmp_path / "clean.h5").touch()
    refused(tmp_path / "clean.h5", "is empty")


def test_file_size_is_bounded(tmp_path, refused, small_limit):
    (tmp_path / "clean.h5").write_bytes(bytes(small_limit + 1))
    refused(tmp_path / "clean.h5", "too large", "10,001 bytes")


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 2)))
    return stream.getvalue()


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"label,pixel0,pixel1\n3,0,255\n", "It is a text file"),
        (npy(), "a single NumPy array"),
        (png(), "a single picture"),
        (pickle.dumps([1, 2]), "looks like a pickle"),
        (b"\x01\x00\x02\xff", "format is not known"),
        (b"\0\0", "format is not known"),
    ],
)
@pytest.mark.parametrize("suffix", ["h5", "npz"])
def test_strangers(tmp_path, refused, content, fragment, suffix):
    (tmp_path / f"clean.{suffix}").write_bytes(content)
    refused(tmp_path / f"clean.{suffix}", "does not hold labelled images", fragment)


def test_does_not_import_torch():
    code = "import sys, backdoorscan.formats.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.real
def test_real_faces(shared):
    clean = load_images(shared / "data/csaw_faces_clean.h5")
    assert clean.shape == (3, 55, 47)
    assert clean.labels.tolist() == [43, 328, 196, 1268, 748]
    assert set(load_images(shared / "data/csaw_faces_sunglasses.h5").labels.tolist()) == {0}


@pytest.mark.real
@pytest.mark.parametrize(("name", "shape", "classes"), [("mnist", (1, 28, 28), 10), ("gtsrb_32", (3, 32, 32), 43)])
def test_real_archives(shared, name, shape, classes):
    loaded = load_images(f"{shared}/data/{name}.npz#test", limit=classes * 5)
    assert loaded.shape == shape
    assert np.bincount(loaded.labels).tolist() == [5] * classes


@pytest.mark.real
def test_real_models_are_not_images(shared, refused):
    for path in ("csaw/lab3_bd_net.h5", "mnist/zkp1_clean.pth", "mnist/cntk_clean_opset7.onnx"):
        refused(shared / "models" / path)
