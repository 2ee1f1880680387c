import numpy as np
import pytest

from backdoorscan.bench.data import load_datasets
from backdoorscan.errors import ImagesError, UsageError


def rows(images):
    return {image.tobytes() for image in images.pixels}


def test_the_three_parts_have_nothing_in_common(image_file):
    (data,) = load_datasets([image_file(300)])
    assert (len(data.test), len(data.clean), len(data.train)) == (60, 100, 140)
    assert (data.name, data.shape, data.num_classes) == ("made", (3, 12, 12), 2)
    parts = [rows(part) for part in (data.test, data.clean, data.train)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 300


def test_the_same_seed_gives_the_same_parts(image_file):
    source = image_file(300)
    first, again, other = (load_datasets([source], seed=seed)[0] for seed in (0, 0, 1))
    assert first.train.sha256 == again.train.sha256 != other.train.sha256


def test_the_defender_gets_as_many_as_asked_for(image_file):
    (data,) = load_datasets([image_file(300)], clean=40)
    assert (len(data.clean), len(data.train)) == (40, 200)
    with pytest.raises(UsageError, match="would be the defender's"):
        load_datasets([image_file(300)], clean=200)


def test_the_digits_are_all_there(digits):
    assert len(digits.train) + len(digits.clean) + len(digits.test) == 1797
    assert (digits.shape, digits.num_classes) == ((1, 16, 16), 10)


def test_float_images_become_bytes(tmp_path):
    pixels = np.random.default_rng(0).random((90, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "floats.npz", x=pixels, y=np.arange(90) % 3)
    (data,) = load_datasets([str(tmp_path / "floats.npz")])
    assert data.train.pixels.dtype == np.uint8
    kept = {tuple(row) for row in np.rint(pixels.reshape(90, -1) * 255).astype(np.uint8)}
    assert {tuple(row) for row in data.train.pixels.reshape(len(data.train), -1)} <= kept


def test_files_of_one_name_are_told_apart(image_file, tmp_path):
    (tmp_path / "b").mkdir()
    first, second = image_file(80), tmp_path / "b" / "made.npz"
    second.write_bytes((tmp_path / "made.npz").read_bytes())
    names = [data.name for data in load_datasets([first, str(second), first])]
    assert names == ["made", str(second)]


def test_too_few_images_are_refused(image_file):
    with pytest.raises(ImagesError, match="holds 50 images of 2 classes"):
        load_datasets([image_file(50)])
