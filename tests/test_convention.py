from collections.abc import Callable

import numpy as np
import pytest
import torch

from backdoorscan.classifier import InputConvention
from backdoorscan.errors import ConventionError
from backdoorscan.formats import convention as conventions
from backdoorscan.images import LabelledImages

CLASSES = 4


def images() -> LabelledImages:
    """Class k has its k-th pixel white on dark grey noise."""
    random = np.random.default_rng(0)
    labels = np.arange(80) % CLASSES
    pixels = random.integers(0, 60, (80, 1, 2, 2))
    pixels.reshape(80, 4)[np.arange(80), labels] = 255
    return LabelledImages(pixels.astype(np.uint8), labels, "here")


def trained(right: InputConvention) -> Callable[[InputConvention, torch.Tensor], torch.Tensor]:
    """A network that looks for pixels of 60 % grey as they are under ``right``."""

    def logits(tried: InputConvention, pixels: torch.Tensor) -> torch.Tensor:
        grey = right.apply(torch.full_like(pixels, 0.6))
        return -20 * (tried.apply(pixels) - grey).abs().mean(1).flatten(1)

    return logits


def grey_images(channels: int) -> LabelledImages:
    """Class k has its k-th pixel at 60 % grey, among black and bright ones."""
    labels = np.arange(80) % CLASSES
    kinds = np.array([0.6, 0.0, 0.9, 0.0], np.float32)[(np.arange(4) - labels[:, None]) % 4]
    return LabelledImages(np.repeat(kinds.reshape(80, 1, 2, 2), channels, 1), labels, "here")


PLAIN = [InputConvention(0, 1), InputConvention(-1, 1), InputConvention(0, 255)]


@pytest.mark.parametrize("right", PLAIN, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_right_scale_is_found(right, channels):
    tried = conventions.candidates(channels, None)
    chosen, trials = conventions.find(trained(right), grey_images(channels), tried, CLASSES, seed=0)
    assert chosen.convention == right
    assert chosen.accuracy == 1
    assert len(trials) == (5 if channels == 3 else 4)


def test_two_channels_have_no_usual_statistics():
    assert conventions.candidates(2, None) == PLAIN


def test_a_pinned_convention_is_not_questioned():
    pinned = InputConvention(0, 7)
    tried = conventions.candidates(1, pinned)
    assert tried == [pinned]
    chosen, trials = conventions.find(lambda c, x: torch.zeros(len(x), CLASSES), images(), tried, CLASSES, seed=0)
    assert (chosen.convention, len(trials)) == (pinned, 1)


def test_the_most_accurate_wins_over_the_plainest():
    def logits(tried, pixels):
        right = 10.0 * pixels.flatten(1)
        return right if tried == InputConvention(0, 255) else right.roll(1, 1)

    chosen, _ = conventions.find(logits, images(), PLAIN, CLASSES, seed=0)
    assert chosen.convention == InputConvention(0, 255)


def test_among_equals_the_plainest_that_is_sure_enough():
    def logits(tried, pixels):  # only surer of itself the larger the scale
        return tried.apply(pixels).flatten(1)

    chosen, trials = conventions.find(logits, images(), PLAIN, CLASSES, seed=0)
    assert [trial.accuracy for trial in trials] == [1, 1, 1]
    sure = [t for t in trials if t.loss <= 0.25 * np.log(CLASSES)]
    assert chosen is sure[0]


def test_guessing_is_refused_with_the_figures():
    def logits(tried, pixels):
        return torch.rand(len(pixels), CLASSES, generator=torch.Generator().manual_seed(1))

    with pytest.raises(ConventionError) as caught:
        conventions.find(logits, images(), PLAIN, CLASSES, seed=0)
    assert "0..255" in caught.value.why
    assert "--input-range" in caught.value.hint


def test_a_network_that_overflows_under_one_convention_is_no_obstacle():
    def logits(tried, pixels):
        return tried.apply(pixels).flatten(1) * (1e38 if tried.high == 255 else 20)

    chosen, trials = conventions.find(logits, images(), PLAIN, CLASSES, seed=0)
    assert chosen.convention == InputConvention(0, 1)
    assert trials[2].loss == float("inf")


def test_describe():
    assert conventions.describe(InputConvention(0, 255, layout="NHWC")) == "0..255"
    assert conventions.describe(InputConvention(mean=(0.5,), std=(0.25,))) == "0..1 mean 0.5 std 0.25"
