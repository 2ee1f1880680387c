import numpy as np
import pytest
from PIL import Image

from backdoorscan.formats.images import load_images


def fill(folder, count=2, *, value=10, size=(7, 5), mode="RGB", suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = value + i
        Image.new(mode, size, colour if mode == "L" else (colour, 0, 255)).save(folder / f"{i}.{suffix}")


def test_names_in_sorted_order(tmp_path):
    for value, name in ((20, "dog"), (10, "cat"), (30, "fox")):
        fill(tmp_path / name, value=value)
    loaded = load_images(tmp_path)
    assert loaded.pixels.shape == (6, 3, 5, 7)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert loaded.pixels[:, 0, 0, 0].tolist() == [10, 11, 20, 21, 30, 31]
    assert loaded.source == str(tmp_path)


def test_numbers_are_labels(tmp_path):
    for number in ("2", "10", "00007"):
        fill(tmp_path / number, count=1, value=int(number))
    loaded = load_images(tmp_path)
    assert loaded.labels.tolist() == loaded.pixels[:, 0, 0, 0].tolist()
    assert sorted(loaded.labels.tolist()) == [2, 7, 10]


def test_one_name_that_is_no_number(tmp_path):
    for name in ("2", "10", "x", "9" * 30):
        fill(tmp_path / name, count=1)
    assert load_images(tmp_path).labels.tolist() == [0, 1, 2, 3]


def test_numbers_that_are_the_same(tmp_path, refused):
    fill(tmp_path / "1")
    fill(tmp_path / "01")
    refused(tmp_path, "same number", "01, 1")


def test_an_empty_class_counts(tmp_path):
    (tmp_path / "ape").mkdir()
    fill(tmp_path / "cat")
    assert load_images(tmp_path).labels.tolist() == [1, 1]


def test_grey(tmp_path):
    fill(tmp_path / "a", mode="L")
    assert load_images(tmp_path).shape == (1, 5, 7)


def test_formats_may_be_mixed(tmp_path):
    for suffix in ("png", "jpg", "bmp", "ppm"):
        fill(tmp_path / suffix, suffix=suffix)
    assert len(load_images(tmp_path)) == 8


@pytest.mark.parametrize("change", [{"size": (5, 7)}, {"mode": "L"}])
def test_differing_pictures(tmp_path, refused, change):
    fill(tmp_path / "a", count=3)
    fill(tmp_path / "b", count=1, **change)
    refused(tmp_path, "differ in size or mode", str(tmp_path / "b" / "0.png"), "7×5 RGB")


def test_hidden_files_and_notes_are_passed_over(tmp_path):
    fill(tmp_path / "a")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in (".DS_Store", "README.md", "a/.hidden", "a/GT-00000.csv", "a/Thumbs.db"):
        (tmp_path / name).write_text("text")
    assert len(load_images(tmp_path)) == 2


def test_underscores_are_a_class(tmp_path):
    fill(tmp_path / "__background__")
    fill(tmp_path / "a")
    assert load_images(tmp_path).labels.tolist() == [0, 0, 1, 1]


def test_other_files_must_be_pictures(tmp_path, refused):
    fill(tmp_path / "a")
    (tmp_path / "a" / "model.bin").write_bytes(b"1234")
    refused(tmp_path, f"{tmp_path / 'a' / 'model.bin'} is not a picture")


def test_a_damaged_picture_is_not_left_out(tmp_path, refused):
    fill(tmp_path / "a", size=(70, 50))
    path = tmp_path / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    refused(tmp_path, f"{path} cannot be read as a picture")


def test_wrong_depth(tmp_path, refused):
    fill(tmp_path / "test" / "a")
    refused(tmp_path, "inside a class folder", "whose own folders are the classes")
    refused(tmp_path / "test" / "a", "0.png lies outside the class folders", "folder/class/picture")


def test_nothing_there(tmp_path, refused):
    refused(tmp_path, "holds no class folders")
    (tmp_path / "a").mkdir()
    refused(tmp_path, "hold no pictures")


def test_no_splits(tmp_path, refused):
    fill(tmp_path / "a")
    refused(f"{tmp_path}#test", "there is no 'test'", "A folder holds one set")


def test_total_size_is_bounded(tmp_path, refused, small_limit):
    fill(tmp_path / "a", count=2, size=(50, 40))
    refused(tmp_path, "too large", "2 pictures together")


def test_limit_opens_only_the_sample(tmp_path, refused):
    fill(tmp_path / "a", count=20, value=0)
    fill(tmp_path / "b", count=4, value=100)
    everything = load_images(tmp_path)
    sample = load_images(tmp_path, limit=6, seed=5)
    assert np.bincount(sample.labels).tolist() == [3, 3]
    assert sample.sha256 == everything.sample(6, 5).sha256
    for path in set((tmp_path / "a").iterdir()):
        if int(path.stem) not in sample.pixels[:, 0, 0, 0]:
            path.write_bytes(b"damaged")
    assert load_images(tmp_path, limit=6, seed=5).sha256 == sample.sha256
    refused(tmp_path, "sample of 0 images", limit=0)
