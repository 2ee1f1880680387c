import numpy as np
import pytest

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.arrays import to_labels, to_pixels


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((2, 3, 5, 7), (2, 3, 5, 7)),
        ((2, 5, 7, 3), (2, 3, 5, 7)),
        ((2, 5, 7, 4), (2, 4, 5, 7)),
        ((2, 5, 7, 1), (2, 1, 5, 7)),
        ((2, 5, 7), (2, 1, 5, 7)),
        ((2, 3, 5, 3), (2, 3, 5, 3)),  # both could be: channels first
    ],
)
def test_axes(stored, expected):
    array = np.arange(np.prod(stored), dtype=np.uint8).reshape(stored)
    pixels = to_pixels(array, "here")
    assert pixels.shape == expected
    assert pixels.flags.c_contiguous
    if stored[-1] != expected[-1]:
        assert np.array_equal(pixels[1, 0], array[1, :, :, 0])


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [
        ((2, 5, 7, 2), "which axis holds the channels"),
        ((2, 784), "shape (2, 784)"),
        ((2,), "shape (2,)"),
        ((2, 1, 1, 5, 7), "shape (2, 1, 1, 5, 7)"),
        ((0, 3, 5, 7), "no images"),
        ((2, 3, 0, 7), "no images"),
        ((), "shape ()"),
    ],
)
def test_wrong_shapes(shape, fragment):
    with pytest.raises(ImagesError) as caught:
        to_pixels(np.zeros(shape, np.uint8), "here")
    assert fragment in str(caught.value)


def row(*values, dtype=np.float64):
    return np.array(values, dtype).reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (row(0, 128, 255, dtype=np.uint8), np.uint8([0, 128, 255])),
        (row(0, 1, 1, dtype=np.uint8), np.uint8([0, 1, 1])),
        (row(0, 128, 255, dtype=np.float64), np.uint8([0, 128, 255])),
        (row(0, 128, 255, dtype=np.float16), np.uint8([0, 128, 255])),
        (row(0, 128, 255, dtype=">i4"), np.uint8([0, 128, 255])),
        (row(0, 128, 255, dtype=np.uint64), np.uint8([0, 128, 255])),
        (row(0, 0.5, 1), np.float32([0, 0.5, 1])),
        (row(0, 0.5, 1, dtype=np.float16), np.float32([0, 0.5, 1])),
        (row(0, 1, dtype=np.bool_), np.float32([0, 1])),
        (row(0, 1, dtype=np.int64), np.float32([0, 1])),
        (row(-1e-7, 1 + 1e-7), np.float32([0, 1])),
        (row(0, 127.5, 255), np.float32([0, 0.5, 1])),
    ],
)
def test_values(array, expected):
    pixels = to_pixels(array, "here")
    assert pixels.dtype == expected.dtype
    assert np.array_equal(pixels.ravel(), expected)


@pytest.mark.parametrize(
    ("array", "fragment"),
    [
        (row(-1, 0, 1), "go from -1 to 1"),
        (row(-3, 200, dtype=np.int16), "negative"),
        (row(0, 256, dtype=np.int16), "exceed 255"),
        (row(0, 300.5), "exceed 255"),
        (row(0, 2.8), "neither 0..1 nor 0..255"),
        (row(0, 16), "neither 0..1 nor 0..255"),
        (row(0, np.nan), "not numbers"),
        (row(0, np.inf), "not numbers"),
        (row(0, -np.inf, dtype=np.float32), "not numbers"),
    ],
)
def test_wrong_values(array, fragment):
    with pytest.raises(ImagesError) as caught:
        to_pixels(array, "here")
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.array([2, 0, 1]),
        np.array([2, 0, 1], np.uint8),
        np.array([2, 0, 1], ">f8"),
        np.array([[2], [0], [1]]),
        np.eye(3)[[2, 0, 1]],
        np.eye(5, dtype=bool)[[2, 0, 1]],
    ],
)
def test_labels(array):
    labels = to_labels(array, "here")
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("array", "fragment"),
    [
        (np.array([0, 1.5]), "label 1.5 of image 1"),
        (np.array([0, np.nan]), "label nan of image 1"),
        (np.array([0, np.inf]), "label inf of image 1"),
        (np.array([-1, 0]), "label -1 of image 0"),
        (np.array([0, 2**64 - 1], np.uint64), "label 18446744073709551615 of image 1"),
        (np.array([]), "shape (0,)"),
        (np.array(3), "shape ()"),
        (np.zeros((2, 2, 2)), "shape (2, 2, 2)"),
        (np.array([[0, 1], [1, 1]]), "not one-hot"),
        (np.array([[0, 1], [0, 0]]), "not one-hot"),
        (np.array([[0.9, 0.1], [0, 1]]), "not one-hot"),
        (np.array([[np.nan, 1], [0, 1]]), "not one-hot"),
    ],
)
def test_wrong_labels(array, fragment):
    with pytest.raises(ImagesError) as caught:
        to_labels(array, "here")
    assert fragment in str(caught.value)
