"""What a classifier of clean images alone makes of a trigger."""

import pytest
import torch

from backdoorscan.ops.outsider import learn

CLASSES = 4


def images_of(labels, side=8, seed=0):
    """Each class has a bright quarter of its own, in noise."""
    images = 0.2 * torch.rand(len(labels), 1, side, side, generator=torch.Generator().manual_seed(seed))
    for image, label in zip(images, labels.tolist(), strict=True):
        quarter(image, label)[:] += 0.6
    return images


def quarter(image, label):
    half = image.shape[-1] // 2
    down, right = divmod(label, 2)
    return image[..., down * half : (down + 1) * half, right * half : (right + 1) * half]


@pytest.fixture
def labels():
    return torch.arange(200) % CLASSES


@pytest.fixture
def outsider(labels):
    return learn(images_of(labels), labels, CLASSES)


def test_it_recognises_images_it_has_not_seen(outsider, labels):
    scores = outsider.scores(images_of(labels, seed=1))
    assert (scores.argmax(1) == labels).all()
    assert scores.max(1).values.mean() == pytest.approx(1, abs=0.2)


def test_looking_like_the_target_is_natural_and_a_mark_of_no_class_is_not(outsider, labels):
    others = images_of(labels, seed=1)[labels != 3]
    natural, odd, away = others.clone(), others.clone(), others.clone()
    quarter(natural, 3)[:] = 1
    odd[..., 0, 0] = 1  # says a little of class 0, nothing of class 3
    quarter(away, 1)[:] = 1
    figures = [outsider.natural(others, stamped, 3)["natural"] for stamped in (natural, others, odd, away)]
    assert figures[0] > 0.5
    assert figures[1] == 0
    assert figures[0] > figures[1] > figures[2] > figures[3]


def test_the_figure_is_the_lead_of_the_mean_rise_in_standard_deviations(outsider, labels):
    others = images_of(labels, seed=1)[labels != 3]
    stamped = others.clone()
    quarter(stamped, 3)[:] += 0.3
    before, after = outsider.scores(others), outsider.scores(stamped)
    rise = (after - before).mean(0)
    expected = (rise[3] - rise[:3].max()) / before.std(correction=0)
    assert outsider.natural(others, stamped, 3) == {"natural": pytest.approx(float(expected), rel=1e-5)}


def test_it_says_nothing_of_classes_it_does_not_know(labels):
    known = labels[labels != 2]
    outsider = learn(images_of(known), known, CLASSES)
    some = images_of(labels)
    assert outsider.natural(some, some, 2) == {}
    assert outsider.natural(some, some, 1) == {"natural": 0}


@pytest.mark.parametrize(("count", "answers"), [(99, False), (100, True)])
def test_too_few_images_teach_nothing(labels, count, answers):
    outsider = learn(images_of(labels)[:count], labels[:count], CLASSES)
    some = images_of(labels)
    assert bool(outsider.natural(some, some, 0)) is answers


@pytest.mark.parametrize(("classes", "answers"), [(16, True), (17, False)])
def test_of_many_classes_it_says_nothing(labels, classes, answers):
    some = images_of(labels)
    assert bool(learn(some, labels, classes).natural(some, some, 0)) is answers


def test_large_images_and_many_are_looked_at_in_part():
    labels = torch.arange(1200) % CLASSES
    outsider = learn(images_of(labels, side=48), labels, CLASSES)
    assert outsider.known.shape == (1000, 32 * 32)
    fresh = images_of(labels[:80], side=48, seed=1)
    assert (outsider.scores(fresh).argmax(1) == labels[:80]).all()


def test_images_that_are_all_the_same_are_no_fault():
    same = torch.full((120, 1, 4, 4), 0.5)
    outsider = learn(same, torch.arange(120) % CLASSES, CLASSES)
    assert outsider.natural(same, same, 0) == {"natural": 0}
