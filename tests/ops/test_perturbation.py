import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from backdoorscan.classifier import to_tensor
from backdoorscan.ops.inversion import Schedule
from backdoorscan.ops.perturbation import Additive, Warp, find_perturbations

SCHEDULE = Schedule(
    steps=80,
    batches=1,
    batch_size=6,
    learning_rate=0.02,
    restarts=1,
    screening=80,
    init_cost=1e-2,
    cost_multiplier=1.12,
    patience=1,
    attack_success_threshold=0.9,
    smoothing=0.85,
    early_stop_threshold=0.99,
    early_stop_patience=30,
)
KINDS = {Additive: SCHEDULE, Warp: replace(SCHEDULE, learning_rate=0.1, init_cost=0.1)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(rows=3, count=4, shape=(2, 9, 9)):
    return torch.rand(rows, count, *shape, generator=generator(1))


def with_parameters(family, change):
    with torch.no_grad():
        change(family.parameters)
    return family


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_nothing(kind):
    family, images = with_parameters(kind(3, (2, 9, 9), generator()), lambda p: p.zero_()), some_images()
    torch.testing.assert_close(family.apply(images, torch.arange(3)), images, rtol=0, atol=1e-5)
    assert family.size(torch.arange(3)).tolist() == pytest.approx([1e-4] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_is_small_and_follows_from_the_generator(kind):
    one, same, other = (kind(3, (2, 9, 9), generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.parameters, same.parameters)
    assert not torch.equal(one.parameters, other.parameters)
    assert one.parameters.requires_grad
    moved = one.apply(some_images(), torch.arange(3)).detach()
    assert 0 < float((moved - some_images()).abs().mean()) < 0.1


def test_added_pixels_are_clipped():
    family = with_parameters(Additive(3, (2, 9, 9), generator()), lambda p: p.mul_(20))
    rows, images = torch.tensor([2, 0]), some_images(rows=2)
    delta = family.parameters.detach().numpy()[[2, 0]]
    expected = np.clip(images.numpy() + delta[:, None], 0, 1)
    np.testing.assert_allclose(family.apply(images, rows).detach().numpy(), expected, rtol=0, atol=1e-6)
    norms = [np.linalg.norm(row) for row in delta]
    assert family.size(rows).tolist() == pytest.approx(norms, rel=1e-4)


def test_a_shift_by_one_pixel():
    def right(parameters):
        parameters.zero_()
        parameters[1, 0] = 1

    family, images = with_parameters(Warp(2, (2, 9, 9), generator()), right), some_images(rows=1)
    shifted = family.apply(images, torch.tensor([1])).detach().numpy()
    expected = images.numpy()[..., np.minimum(np.arange(9) + 1, 8)]
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-5)
    # Of the two components one is a pixel.
    assert family.size(torch.tensor([1])).item() == pytest.approx(math.sqrt(0.5), rel=1e-4)


def test_each_point_of_the_grid_is_moved_as_its_parameters_say():
    family, images = Warp(2, (1, 9, 9), generator(2)), some_images(rows=1, shape=(1, 9, 9))
    warped = family.apply(images, torch.tensor([1])).detach().numpy()[0, :, 0]
    across, down = family.parameters.detach().numpy()[1]
    # Nine pixels lie on a grid of five points: every other pixel is a point of it.
    rows, columns = np.meshgrid(np.arange(0, 9, 2), np.arange(0, 9, 2), indexing="ij")
    for before, after in zip(images.numpy()[0, :, 0], warped, strict=True):
        expected = ndimage.map_coordinates(before, [rows + down, columns + across], order=1, mode="nearest")
        np.testing.assert_allclose(after[::2, ::2], expected, rtol=0, atol=1e-5)


def test_images_higher_than_wide_are_warped_in_pixels():
    def down(parameters):
        parameters.zero_()
        parameters[0, 1] = 2

    family, images = with_parameters(Warp(1, (1, 12, 5), generator()), down), some_images(1, 2, (1, 12, 5))
    expected = images.numpy()[..., np.minimum(np.arange(12) + 2, 11), :]
    moved = family.apply(images, torch.tensor([0])).detach().numpy()
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-5)


@pytest.fixture
def search(triple):
    def run(kind, target=2, targets=range(5), schedule=None, change=lambda classifier, pixels, labels: None):
        classifier, images, _ = triple(target)
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        change(classifier, pixels, labels)
        targets = list(targets)
        family = kind(len(targets), images.shape, generator())
        found, samples = find_perturbations(
            classifier, pixels, labels, targets, family, schedule or KINDS[kind], generator(1)
        )
        return found, samples, classifier, pixels, labels

    return run


def test_the_planted_label_needs_the_weakest_pattern(search):
    found, _, classifier, pixels, labels = search(Additive)
    assert all(one.succeeded for one in found)
    sizes = [one.size for one in found]
    assert min(sizes[:2] + sizes[3:]) > 1.5 * sizes[2]
    with torch.no_grad():
        reached = classifier(found[2].apply(pixels[labels != 2])).argmax(1) == 2
    assert reached.float().mean() > 0.7  # 0.9 is held on a running average of batches of six
    assert sizes[2] == pytest.approx(float(found[2].parameters.norm()), rel=1e-4)


def test_what_was_found_does_what_its_parameters_say(search):
    found, _, _, pixels, _ = search(Additive, schedule=replace(SCHEDULE, steps=10))
    for one in found:
        assert not one.parameters.requires_grad
        torch.testing.assert_close(one.apply(pixels), (pixels + one.parameters).clamp(0, 1))


def test_a_label_that_cannot_be_reached_is_reported(search):
    def close(classifier, _pixels, _labels):
        classifier.network.fc.bias.data[4] = -1000

    found, *_ = search(Additive, change=close)
    assert [one.succeeded for one in found] == [True] * 4 + [False]
    assert math.isfinite(found[4].size)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_the_target_are_not_used_and_all_others_are_counted(search, kind):
    seen = []

    def prepare(classifier, pixels, labels):
        pixels[labels == 3] = math.nan
        classifier.network.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].clone()))
        classifier.network.conv1.weight.requires_grad_(False)

    schedule = replace(KINDS[kind], steps=4)
    found, samples, classifier, *_ = search(kind, targets=[3], schedule=schedule, change=prepare)
    assert all(bool(images.isfinite().all()) for images in seen)
    assert samples == sum(map(len, seen)) == 4 * 6
    assert found[0].parameters.isfinite().all()
    frozen = [name for name, parameter in classifier.named_parameters() if not parameter.requires_grad]
    assert frozen == ["network.conv1.weight"]
