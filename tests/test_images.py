import numpy as np
import pytest

from backdoorscan.errors import ImagesError
from backdoorscan.images import LabelledImages, balanced_sample


def make(labels, dtype=np.uint8) -> LabelledImages:
    labels = np.asarray(labels, np.int64)
    pixels = np.arange(len(labels) * 12).reshape(len(labels), 3, 2, 2) % 256
    return LabelledImages(pixels.astype(dtype) if dtype == np.uint8 else (pixels / 255).astype(dtype), labels, "here")


def test_shape_and_length():
    images = make([0, 1, 2])
    assert images.shape == (3, 2, 2)
    assert len(images) == 3


@pytest.mark.parametrize(
    ("pixels", "labels", "fragment"),
    [
        (np.zeros((0, 1, 2, 2), np.uint8), [], "holds no images"),
        (np.zeros((2, 2, 2), np.uint8), [0, 0], "holds no images"),
        (np.zeros((2, 1, 2, 2), np.uint8), [0], "2 images but labels of shape (1,)"),
        (np.zeros((2, 1, 2, 2), np.uint8), [[0], [1]], "labels of shape (2, 1)"),
        (np.zeros((2, 1, 2, 2), np.uint8), [0, -1], "label -1 is negative"),
        (np.full((1, 1, 2, 2), 1.1, np.float32), [0], "not within [0, 1]"),
        (np.full((1, 1, 2, 2), -0.1, np.float32), [0], "not within [0, 1]"),
        (np.full((1, 1, 2, 2), np.nan, np.float32), [0], "not within [0, 1]"),
        (np.zeros((1, 1, 2, 2), np.float64), [0], "float64"),
    ],
)
def test_refuses(pixels, labels, fragment):
    with pytest.raises(ImagesError) as caught:
        LabelledImages(pixels, np.array(labels, np.int64), "here")
    assert fragment in str(caught.value)


def test_one_nan_among_good_pixels_is_refused():
    pixels = np.zeros((2, 1, 2, 2), np.float32)
    pixels[1, 0, 1, 0] = np.nan
    with pytest.raises(ImagesError):
        LabelledImages(pixels, np.array([0, 1]), "here")


def test_digest_depends_on_content_only():
    one, other = make([0, 1]), make([0, 1])
    assert one.sha256 == other.sha256
    assert one.sha256 != make([1, 0]).sha256
    assert one.sha256 != make([0, 1], np.float32).sha256
    assert one.sha256 != one.take(np.array([1, 0])).sha256
    transposed = np.asfortranarray(one.pixels)
    assert LabelledImages(transposed, one.labels, "elsewhere").sha256 == one.sha256


def test_take_keeps_pixels_with_their_labels():
    images = make([5, 6, 7])
    taken = images.take(np.array([2, 0]))
    assert taken.labels.tolist() == [7, 5]
    assert np.array_equal(taken.pixels[1], images.pixels[0])
    assert taken.source == "here"


def test_check_fits():
    make([0, 4]).check_fits(5)
    with pytest.raises(ImagesError, match="label 4 does not exist in a model of 4 classes"):
        make([0, 4]).check_fits(4)


UNEVEN = np.repeat([0, 1, 2, 9], [50, 7, 2, 30])


@pytest.mark.parametrize("count", [1, 3, 4, 8, 11, 25, 60, 88])
@pytest.mark.parametrize("seed", [0, 1, 17])
def test_sample_is_balanced(count, seed):
    labels = np.random.default_rng(seed).permutation(UNEVEN)
    index = balanced_sample(labels, count, seed)
    assert len(index) == count
    assert np.all(np.diff(index) > 0), "ascending and without repetition"
    taken = {label: int((labels[index] == label).sum()) for label in (0, 1, 2, 9)}
    for label, number in taken.items():
        if number < (labels == label).sum():  # a class that has some left is at most one behind
            assert number >= max(taken.values()) - 1


def test_sample_of_all_or_more_is_everything():
    images = make([0, 1, 1])
    assert images.sample(3, 0) is images
    assert images.sample(4, 0) is images


def test_sample_is_repeatable_and_depends_on_the_seed():
    labels = np.zeros(1000, np.int64)
    assert np.array_equal(balanced_sample(labels, 10, 3), balanced_sample(labels, 10, 3))
    assert not np.array_equal(balanced_sample(labels, 10, 3), balanced_sample(labels, 10, 4))


def test_sample_does_not_prefer_low_classes_or_early_images():
    labels = np.repeat(np.arange(10), 20)
    drawn = np.concatenate([balanced_sample(labels, 5, seed) for seed in range(2000)])
    per_class = np.bincount(labels[drawn], minlength=10)
    assert per_class.min() > 850
    assert per_class.max() < 1150
    per_image = np.bincount(drawn, minlength=200)  # 50 expected, standard deviation 7
    assert per_image.min() > 20
    assert per_image.max() < 90


def test_sample_keeps_pixels_with_their_labels():
    labels = np.arange(40) % 4
    pixels = np.broadcast_to(labels[:, None, None, None], (40, 1, 2, 2)).astype(np.uint8)
    sample = LabelledImages(pixels, labels, "here").sample(10, 0)
    assert np.array_equal(sample.pixels[:, 0, 0, 0], sample.labels)


@pytest.mark.parametrize("count", [0, -1])
def test_sample_must_be_positive(count):
    with pytest.raises(ImagesError, match=f"sample of {count} images"):
        make([0]).sample(count, 0)
