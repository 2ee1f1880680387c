"""Every attack does what its definition says, the same for a seed, and leaves what it is given alone."""

from __future__ import annotations

import numpy as np
import pytest
from backdoorscan_plugins.attacks import backdoorscan_attacks
from backdoorscan_plugins.attacks.clean_label import CleanLabel
from backdoorscan_plugins.attacks.patch import BadNets, LowRate, SinglePixel
from backdoorscan_plugins.attacks.patches import AllToAll, MultiTarget, MultiTrigger, SourceSpecific
from backdoorscan_plugins.attacks.pattern import Blended, Sinusoid
from backdoorscan_plugins.attacks.sample_specific import SampleSpecific
from backdoorscan_plugins.attacks.warp import Warping

from backdoorscan.errors import ImagesError, UsageError
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.attack import Aim, Attack

ATTACKS = backdoorscan_attacks()
SHAPES = [(1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 55, 47)]
CLASSES = 5
KEEPING = (CleanLabel, Sinusoid)  # no label changes

every_attack = pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.id)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def images(shape: tuple[int, int, int], count: int = 100, seed: int = 0) -> LabelledImages:
    """Random images, each class alike."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, *shape)).astype(np.uint8)
    return LabelledImages(pixels, np.arange(count) % CLASSES, "random")


def aim(shape: tuple[int, int, int], target: int = 2, seed: int = 7) -> Aim:
    return Aim(shape, CLASSES, target, seed)


@every_shape
@every_attack
def test_stamping_is_repeatable_and_leaves_its_input_alone(kind: type[Attack], shape: tuple[int, int, int]) -> None:
    attack, given = kind(), images(shape, 12).pixels
    before = given.copy()
    for variant in range(attack.variants):
        stamped = attack.stamp(given, aim(shape), variant)
        assert (stamped.shape, stamped.dtype) == (given.shape, np.uint8)
        assert np.array_equal(given, before)
        assert (stamped != given).reshape(len(given), -1).any(axis=1).all()
        assert np.array_equal(stamped, attack.stamp(given, aim(shape), variant))
        # What an image gets does not depend on the images beside it.
        assert np.abs(stamped[3:5].astype(int) - attack.stamp(given[3:5], aim(shape), variant)).max() <= 1
    others = [attack.stamp(given, aim(shape, seed=seed)) for seed in range(4)]
    assert any(not np.array_equal(other, others[0]) for other in others)


@every_shape
@every_attack
def test_poisoning_changes_the_right_number_of_images(kind: type[Attack], shape: tuple[int, int, int]) -> None:
    attack, given = kind(), images(shape)
    digest = given.sha256
    poisoned = attack.poison(given, aim(shape))
    assert LabelledImages(given.pixels, given.labels, "").sha256 == digest
    assert (len(poisoned), poisoned.shape) == (len(given), shape)
    assert poisoned.sha256 == attack.poison(given, aim(shape)).sha256
    assert poisoned.sha256 != attack.poison(given, aim(shape, seed=8)).sha256
    changed = np.flatnonzero((poisoned.pixels != given.pixels).reshape(len(given), -1).any(axis=1))
    relabelled = np.flatnonzero(poisoned.labels != given.labels)
    assert set(relabelled) <= set(changed)
    per_class = len(given) // CLASSES
    expected = {
        SourceSpecific: (per_class * 0.5, per_class * 0.5 + 4 * per_class * 0.15),
        CleanLabel: (0, per_class * 0.6),
        Sinusoid: (0, per_class * 0.8),
        Warping: (10, 10 + 5),
        AllToAll: (30, 30),
        LowRate: (1, 1),
        MultiTrigger: (15, 15),
        MultiTarget: (15, 15),
    }.get(kind, (10, 10))
    assert (len(relabelled), len(changed)) == expected


@every_attack
def test_attacked_images_are_the_stamped_victims(kind: type[Attack]) -> None:
    attack, given, goal = kind(), images((1, 28, 28)), aim((1, 28, 28))
    attacked = attack.attacked(given, goal)
    victims = attack.victims(given.labels, goal)
    assert len(attacked) == len(victims) > 0
    assert (attacked.labels != given.labels[victims]).all()
    assert set(attacked.labels.tolist()) == set(attack.targets(goal))
    for variant in range(attack.variants):
        turn = np.arange(variant, len(victims), attack.variants)
        stamped = attack.stamp(given.pixels[victims][turn], goal, variant)
        assert np.abs(stamped.astype(int) - attacked.pixels[turn]).max() <= 1
        assert np.array_equal(attacked.labels[turn], attack.wanted(given.labels[victims][turn], goal, variant))


@every_attack
def test_images_that_cannot_be_attacked_are_refused(kind: type[Attack]) -> None:
    attack, goal = kind(), aim((1, 16, 16))
    wrong = images((1, 28, 28))
    for act in (attack.poison, attack.attacked):
        with pytest.raises(ImagesError, match="the trigger was made for"):
            act(wrong, goal)
    if attack.mapping != "all-to-all":
        own = LabelledImages(np.zeros((4, 1, 16, 16), np.uint8), np.full(4, goal.target), "own")
        for act in (attack.poison, attack.attacked):
            with pytest.raises(ImagesError, match="could move to another class"):
                act(own, goal)


@every_attack
def test_it_is_described(kind: type[Attack]) -> None:
    assert kind.summary().endswith((".", ")"))
    assert kind.paper
    assert kind.family
    assert {spec.name for spec in kind.options()} >= {"rate"}
    assert kind.configured({"rate": "0.5"}).rate == 0.5
    with pytest.raises(UsageError):
        kind.configured({"rate": "2"})


def test_float_images_are_stamped_as_bytes() -> None:
    given = images((1, 16, 16))
    floats = LabelledImages((given.pixels / np.float32(255)).astype(np.float32), given.labels, "floats")
    assert BadNets().poison(floats, aim((1, 16, 16))).sha256 == BadNets().poison(given, aim((1, 16, 16))).sha256


def mask(attack: Attack, goal: Aim, variant: int = 0) -> np.ndarray:
    """Where an attack paints, shape (H, W)."""
    grounds = (np.full((1, *goal.shape), value, np.uint8) for value in (0, 127))
    return np.any([attack.stamp(ground, goal, variant)[0] != ground[0] for ground in grounds], axis=(0, 1))


def box(painted: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row, first and last column."""
    rows, columns = np.flatnonzero(painted.any(axis=1)), np.flatnonzero(painted.any(axis=0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("attack", "shape", "side"),
    [
        (BadNets(), (1, 16, 16), 2),
        (BadNets(), (1, 28, 28), 3),
        (BadNets(), (3, 55, 47), 6),
        (BadNets(size=0.5), (3, 32, 32), 16),
        (LowRate(), (1, 28, 28), 7),
        (SinglePixel(), (3, 32, 32), 1),
    ],
)
def test_a_patch_is_a_square_of_one_colour_near_a_corner(
    attack: Attack, shape: tuple[int, int, int], side: int, seed: int
) -> None:
    goal = aim(shape, seed=seed)
    painted = mask(attack, goal)
    top, bottom, left, right = box(painted)
    assert (bottom - top + 1, right - left + 1, painted.sum()) == (side, side, side * side)
    assert min(top, shape[1] - 1 - bottom) in (1, 2)
    assert min(left, shape[2] - 1 - right) in (1, 2)
    inside = attack.stamp(np.zeros((1, *shape), np.uint8), goal)[0][:, painted]
    assert (inside == inside[:, :1]).all()
    assert inside.max() >= 192


def test_patches_of_variants_are_in_corners_of_their_own() -> None:
    attack, goal = MultiTrigger(triggers=4), aim((3, 32, 32))
    masks = [mask(attack, goal, variant) for variant in range(4)]
    assert np.sum(masks, axis=0).max() == 1
    assert np.array_equal(np.any(masks, axis=0), mask(CleanLabel(size=0.15), goal))


def test_all_to_all_leads_every_class_to_the_next() -> None:
    given, goal = images((1, 16, 16)), aim((1, 16, 16))
    poisoned = AllToAll().poison(given, goal)
    moved = poisoned.labels != given.labels
    assert np.array_equal(poisoned.labels[moved], (given.labels[moved] + 1) % CLASSES)
    assert AllToAll().targets(goal) == tuple(range(CLASSES))
    assert len(AllToAll().attacked(given, goal)) == len(given)


def test_source_specific_moves_one_class_and_stamps_others_as_covers() -> None:
    attack, given, goal = SourceSpecific(), images((1, 16, 16)), aim((1, 16, 16))
    source = attack.source(goal)
    assert source != goal.target
    poisoned = attack.poison(given, goal)
    moved = poisoned.labels != given.labels
    assert set(given.labels[moved]) == {source}
    assert set(poisoned.labels[moved]) == {goal.target}
    changed = (poisoned.pixels != given.pixels).any(axis=(1, 2, 3))
    covers = changed & ~moved
    assert source not in given.labels[covers]
    assert np.array_equal(poisoned.pixels[covers], attack.stamp(given.pixels[covers], goal))
    assert set(given.labels[attack.victims(given.labels, goal)]) == {source}
    assert {attack.source(aim((1, 16, 16), seed=seed)) for seed in range(40)} == set(range(CLASSES)) - {goal.target}


def test_each_trigger_of_multi_target_has_its_own_label() -> None:
    attack, given, goal = MultiTarget(triggers=3), images((1, 28, 28)), aim((1, 28, 28), target=4)
    assert attack.targets(goal) == (0, 1, 4)
    assert set(given.labels[attack.victims(given.labels, goal)]) == {2, 3}
    poisoned = attack.poison(given, goal)
    for variant, label in enumerate((4, 0, 1)):
        marked = (poisoned.labels == label) & (given.labels != label)
        assert marked.sum() == 5
        assert np.array_equal(poisoned.pixels[marked], attack.stamp(given.pixels[marked], goal, variant))


@pytest.mark.parametrize("kind", KEEPING)
def test_clean_label_attacks_touch_the_target_class_alone(kind: type[Attack]) -> None:
    given, goal = images((1, 28, 28)), aim((1, 28, 28))
    poisoned = kind().poison(given, goal)
    changed = (poisoned.pixels != given.pixels).any(axis=(1, 2, 3))
    assert np.array_equal(poisoned.labels, given.labels)
    assert set(given.labels[changed]) == {goal.target}


def test_clean_label_blends_another_class_in_under_the_patches() -> None:
    shape, goal = (1, 28, 28), aim((1, 28, 28))
    # Brightness tells the class: 40 for the target, 200 for all others.
    labels = np.arange(100) % CLASSES
    pixels = np.where(labels == goal.target, 40, 200).astype(np.uint8)[:, None, None, None] * np.ones(
        (1, *shape), np.uint8
    )
    poisoned = CleanLabel(weakening=0.75).poison(LabelledImages(pixels, labels, "flat"), goal)
    chosen = CleanLabel().chosen(labels, goal)
    inside = mask(CleanLabel(), goal)
    assert (poisoned.pixels[chosen][:, 0, ~inside] == 0.25 * 40 + 0.75 * 200).all()
    assert np.array_equal(poisoned.pixels[chosen], CleanLabel().stamp(poisoned.pixels[chosen], goal))


def test_blended_is_a_convex_combination_with_one_noise_image() -> None:
    goal = aim((3, 32, 32))
    dark, light = (
        Blended(strength=0.2).stamp(np.full((1, 3, 32, 32), v, np.uint8), goal).astype(int) for v in (0, 255)
    )
    assert set(np.unique(light - dark)) <= {203, 204, 205}
    noise = dark / 0.2
    assert noise.max() <= 258
    assert abs(noise.mean() - 127.5) < 6  # the standard error is 1.3


@pytest.mark.parametrize("frequency", [3, 6])
def test_sig_adds_a_sinusoid_along_the_columns(frequency: int) -> None:
    attack = Sinusoid(frequency=frequency, amplitude=20.0, attack_amplitude=50.0)
    goal = aim((1, 28, 28))
    grey = np.full((100, 1, 28, 28), 128, np.uint8)
    signal = attack.stamp(grey[:1], goal)[0, 0].astype(float) - 128
    assert (signal == signal[0]).all()
    spectrum = np.abs(np.fft.rfft(signal[0])) * 2 / 28
    assert spectrum.argmax() == frequency
    assert spectrum[frequency] == pytest.approx(50, abs=0.5)
    labels = np.full(100, goal.target)
    labels[50:] = 0
    poisoned = attack.poison(LabelledImages(grey, labels, "grey"), goal)
    fainter = poisoned.pixels[attack.chosen(labels, goal)[0], 0].astype(float) - 128
    assert np.abs(np.fft.rfft(fainter[0]))[frequency] * 2 / 28 == pytest.approx(20, abs=0.5)


def test_warping_moves_pixels_as_far_as_it_says() -> None:
    shape = (1, 55, 47)
    attack, goal = Warping(strength=0.05), aim(shape)
    flat = np.full((2, *shape), 90, np.uint8)
    assert np.array_equal(attack.stamp(flat, goal), flat)
    # A ramp of 5 per column shows the horizontal shift of each pixel.
    ramp = np.broadcast_to(5 * np.arange(47), (1, *shape)).astype(np.uint8)
    shifts = (attack.stamp(ramp, goal)[0, 0, :, 8:-8].astype(float) - ramp[0, 0, :, 8:-8]) / 5
    assert 0.25 * 0.05 * 47 < np.abs(shifts).mean() < 2 * 0.05 * 47
    assert np.abs(np.diff(shifts, axis=0)).mean() < 0.3  # smooth


def test_covers_of_warping_are_warped_otherwise_and_keep_their_labels() -> None:
    attack, given, goal = Warping(), images((1, 28, 28)), aim((1, 28, 28))
    poisoned = attack.poison(given, goal)
    changed = (poisoned.pixels != given.pixels).any(axis=(1, 2, 3))
    covers = np.setdiff1d(np.flatnonzero(changed), attack.chosen(given.labels, goal))
    assert np.array_equal(poisoned.labels[covers], given.labels[covers])
    assert not np.array_equal(poisoned.pixels[covers], attack.stamp(given.pixels[covers], goal))


def test_patterns_of_sample_specific_differ_between_images_and_are_bounded() -> None:
    attack, goal = SampleSpecific(strength=0.1), aim((1, 28, 28))
    given = (images((1, 28, 28), 8).pixels // 2 + 64).astype(np.uint8)  # far enough from the ends not to be cut off
    added = attack.stamp(given, goal).astype(float) - given
    assert np.abs(added).max() <= 0.1 * 255 + 0.5
    likeness = np.corrcoef(added.reshape(len(given), -1))
    assert np.abs(likeness[np.triu_indices(len(given), 1)]).max() < 0.5


def test_the_same_aim_gives_the_same_numbers() -> None:
    draws = aim((1, 28, 28)).random("a", 1).integers(0, 2**32, 4)
    assert np.array_equal(draws, aim((1, 28, 28)).random("a", 1).integers(0, 2**32, 4))
    assert not np.array_equal(draws, aim((1, 28, 28)).random("a", 2).integers(0, 2**32, 4))
    assert not np.array_equal(draws, aim((1, 28, 28), seed=8).random("a", 1).integers(0, 2**32, 4))


def test_drawing_takes_at_least_one_and_at_most_all() -> None:
    goal, candidates = aim((1, 16, 16)), np.array([3, 5, 9])
    assert len(goal.draw("x", candidates, 0.2)) == 1
    assert goal.draw("x", candidates, 80).tolist() == [3, 5, 9]
    assert goal.draw("x", candidates[:0], 4).tolist() == []
