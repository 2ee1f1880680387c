import numpy as np
import pytest

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.pairs import Entry, choose_pair, find_pairs

U8 = np.dtype(np.uint8)


def entries(*names):
    """Images of rank 4, labels of rank 1; which is which is told by the names only where both ranks fit."""
    return [Entry(name, (9, 3, 8, 8), U8) for name in names]


@pytest.mark.parametrize(
    ("images", "labels", "choice"),
    [
        ("data", "label", "data"),
        ("x", "y", "x"),
        ("X", "y", "X"),
        ("images", "labels", "images"),
        ("x_test", "y_test", "test"),
        ("X_train", "y_train", "train"),
        ("xTest", "yTest", "test"),
        ("XTest", "YTest", "test"),
        ("test_images", "test_labels", "test"),
        ("test/data", "test/label", "test"),
        ("images", "image_labels", "images"),
        ("val-imgs", "val-targets", "val"),
    ],
)
def test_names(images, labels, choice):
    pairs = find_pairs(entries(labels, images))
    assert [(pair.choice, pair.images.name, pair.labels.name) for pair in pairs] == [(choice, images, labels)]


def test_shapes_decide_where_names_do_not():
    (pair,) = find_pairs([Entry("truth", (9, 1), U8), Entry("faces", (9, 8, 8), U8)])
    assert (pair.images.name, pair.labels.name) == ("faces", "truth")


@pytest.mark.parametrize(
    "held",
    [
        [],
        [Entry("data", (9, 8, 8), U8)],
        [Entry("a", (9, 8, 8), U8), Entry("b", (8,), U8)],
        [Entry("a", (9, 8, 8), U8), Entry("b", (9, 8, 8), U8), Entry("c", (9,), U8)],
        [Entry("x", (9, 8, 8), U8), Entry("X", (9, 8, 8), U8), Entry("y", (9,), U8)],
    ],
)
def test_no_pair_lists_what_there_is(held):
    with pytest.raises(ImagesError) as caught:
        choose_pair(held, None, "file")
    assert "not clear" in caught.value.what
    assert all(entry.name in caught.value.why for entry in held)


def test_long_lists_are_cut():
    with pytest.raises(ImagesError) as caught:
        choose_pair(entries(*(f"weight{i}" for i in range(20))), None, "file")
    assert caught.value.why.endswith("and 12 more.")


def test_choice():
    held = entries("x_test", "y_test", "x_train", "y_train", "data", "label")
    assert choose_pair(held, "test", "file").images.name == "x_test"
    assert choose_pair(held, "TRAIN", "file").images.name == "x_train"
    assert choose_pair(held, "x_train", "file").images.name == "x_train"
    assert choose_pair(held, "data", "file").images.name == "data"
    with pytest.raises(ImagesError) as caught:
        choose_pair(held, None, "file")
    assert caught.value.what == "file holds several sets of images: test, train, data."
    assert caught.value.hint == "Choose one, e.g. 'file#test'."


@pytest.mark.parametrize(("wanted", "hint"), [("tets", "Did you mean 'test'?"), ("zzz", "")])
def test_missing_choice(wanted, hint):
    with pytest.raises(ImagesError) as caught:
        choose_pair(entries("x_test", "y_test", "x_train", "y_train"), wanted, "file")
    assert caught.value.what == f"file: there is no '{wanted}'."
    assert "test, train" in caught.value.why
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("entry", "fragment"),
    [
        (Entry("y", (9,), np.dtype(object)), "pickles"),
        (Entry("y", (9,), np.dtype("U5")), "does not hold numbers"),
        (Entry("y", (9,), np.dtype([("a", "u1")])), "does not hold numbers"),
        (Entry("y", (9,), np.dtype(complex)), "does not hold numbers"),
        (Entry("y", (2**40,), U8), "too large"),
    ],
)
def test_unreadable(entry, fragment):
    with pytest.raises(ImagesError) as caught:
        choose_pair([*entries("x"), entry], None, "file")
    assert fragment in str(caught.value)
