import math

import numpy as np
import pytest
import torch
from torch import fx, nn

from backdoorscan.classifier import Classifier, logits
from backdoorscan.ops.separation import Head, Seen, retrained_head, seen, separation

CLASSES, TARGET = 4, 3
HEAD = Head(lambda features: features[:, :CLASSES], frozenset(range(CLASSES)))


class Odd(nn.Module):
    """Cannot be traced."""

    def forward(self, x):
        return x.flatten(1)[:, :CLASSES] if float(x.sum()) > -1 else x.flatten(1)


@pytest.fixture
def net():
    """Pixels are the features: one for each class, and a fifth, dark on clean images, that leads to class 3."""
    linear = nn.Linear(5, CLASSES)
    weights = torch.zeros(CLASSES, 5)
    weights[:, :CLASSES] = 5 * torch.eye(CLASSES)
    weights[TARGET, 4] = 50
    linear.load_state_dict({"weight": weights, "bias": torch.zeros(CLASSES)})
    network = fx.symbolic_trace(nn.Sequential(nn.Flatten(), linear))
    return Classifier(network, input_shape=(1, 1, 5), num_classes=CLASSES)


@pytest.fixture
def clean():
    """Images (N, 1, 1, 5) and labels."""
    random = np.random.default_rng(0)
    labels = np.arange(80) % CLASSES
    pixels = random.uniform(0, 0.2, (80, 5))
    pixels[np.arange(80), labels] += 0.6
    pixels[:, 4] = 0
    return torch.from_numpy(pixels).float().view(-1, 1, 1, 5), torch.from_numpy(labels)


def measured(net, clean, apply):
    pixels, labels = clean
    head = retrained_head(seen(net, pixels).features, labels, CLASSES)
    others = labels != TARGET
    return separation(seen(net, pixels[others]), seen(net, apply(pixels[others])), labels[others], TARGET, head)


def test_doing_nothing_changes_nothing(net, clean):
    figures = measured(net, clean, lambda images: images)
    assert figures.pop("margin") < 0
    assert figures == pytest.approx(
        {"success": 0, "least": 0, "second": 1, "dispersion": 0, "retention": 1, "transfer": 0}, abs=1e-5
    )


def test_a_trigger_that_adds_something_leaves_the_rest(net, clean):
    def trigger(images):
        return images + torch.tensor([0, 0, 0, 0, 0.5])

    figures = measured(net, clean, trigger)
    # A head that was trained anew does not know the fifth feature.
    assert figures.pop("margin") > 1
    assert figures == pytest.approx(
        {"success": 1, "least": 1, "second": 1, "dispersion": 0, "retention": 1, "transfer": 0}, abs=1e-5
    )


def test_a_picture_of_the_target_wipes_out_the_image(net, clean):
    def picture(images):
        return torch.tensor([0, 0, 0, 0.9, 0]).expand_as(images)

    figures = measured(net, clean, picture)
    assert figures["success"] == figures["transfer"] == 1
    assert figures["dispersion"] == pytest.approx(math.log(1e-6))
    assert figures["retention"] == pytest.approx(0, abs=1e-6)
    assert figures["second"] == pytest.approx(1 / 3)  # of three classes with as many images each the first is named


def test_the_lead_of_the_target_is_in_deviations_of_the_clean_scores(net, clean):
    pixels, labels = clean
    others = labels != TARGET
    before, after = (seen(net, images[others]) for images in (pixels, pixels + torch.tensor([0, 0, 0, 0, 0.1])))
    scores = after.scores.numpy()
    leads = [row[TARGET] - max(np.delete(row, TARGET)) for row in scores]
    figures = separation(before, after, labels[others], TARGET, HEAD)
    assert figures["margin"] == pytest.approx(np.mean(leads) / before.scores.numpy().std(), rel=1e-5)


def test_success_from_the_hardest_class_counts_by_how_many_images_there_are(net, clean):
    pixels, labels = clean
    others = labels != TARGET
    before = seen(net, pixels[others])
    reached = labels[others] != 1

    def separated(copies):
        stamped = before.scores.clone()
        stamped[reached, TARGET] = 1e3
        many, after = (Seen(before.features.repeat(copies, 1), s.repeat(copies, 1)) for s in (before.scores, stamped))
        return separation(many, after, labels[others].repeat(copies), TARGET, HEAD)

    overall = float(reached.double().mean())
    for copies in (1, 20):
        count = copies * int((~reached).sum())
        assert separated(copies)["least"] == pytest.approx(10 * overall / (count + 10))


def test_a_head_that_has_never_seen_the_target_does_not_tell(net, clean):
    pixels, labels = clean
    others = labels != TARGET
    before = seen(net, pixels[others])
    head = retrained_head(before.features, labels[others], CLASSES)
    assert head.classes == {0, 1, 2}
    assert "transfer" not in separation(before, before, labels[others], TARGET, head)


def test_differences_halved(net, clean):
    figures = measured(net, clean, lambda images: images / 2)
    assert figures["dispersion"] == pytest.approx(math.log(0.25), abs=1e-5)
    assert figures["retention"] == pytest.approx(0.5, abs=1e-5)


def test_differences_that_are_not_the_images_own_are_not_retained(net, clean):
    figures = measured(net, clean, lambda images: images.roll(1, 0))
    assert figures["dispersion"] == pytest.approx(0, abs=1e-5)
    assert figures["retention"] < 0.1


def test_how_often_the_true_class_leads_is_relative_to_the_clean_images(net, clean):
    pixels, labels = clean
    wrong = labels.clone()
    wrong[labels == 0] = 1  # a third of the victims is not recognised anyway
    before = seen(net, pixels)
    head = retrained_head(before.features, labels, CLASSES)
    others = labels != TARGET
    figures = separation(before[others], before[others], wrong[others], TARGET, head)
    assert figures["second"] == pytest.approx(1)


def test_the_features_of_a_network_that_cannot_be_followed_are_its_logits(clean):
    network = Classifier(Odd(), input_shape=(1, 1, 5), num_classes=CLASSES)
    both = seen(network, clean[0])
    assert torch.equal(both.features, both.scores)
    assert torch.equal(both.scores, logits(network, clean[0]))


def test_the_scores_are_the_networks(net, clean):
    assert torch.equal(seen(net, clean[0]).scores, logits(net, clean[0]))


def test_the_new_head_is_ridge_regression():
    random = np.random.default_rng(1)
    inputs, labels = random.normal(size=(50, 6)) + 3, np.arange(50) % 3
    head = retrained_head(torch.from_numpy(inputs), torch.from_numpy(labels), 3)
    centred = np.c_[inputs - inputs.mean(0), np.ones(50)]
    gram = centred.T @ centred
    ridge = 1e-2 * np.trace(gram) / 7
    # The same as least squares on the data and, for each weight, one more row that asks for 0.
    stacked = np.r_[centred, math.sqrt(ridge) * np.eye(7)]
    solution, *_ = np.linalg.lstsq(stacked, np.r_[np.eye(3)[labels], np.zeros((7, 3))], rcond=None)
    others = random.normal(size=(5, 6))
    np.testing.assert_allclose(
        head.scores(torch.from_numpy(others)).numpy(), np.c_[others - inputs.mean(0), np.ones(5)] @ solution
    )


def test_the_new_head_recognises_the_classes(net, clean):
    pixels, labels = clean
    known = seen(net, pixels).features
    assert retrained_head(known, labels, CLASSES).scores(known).argmax(1).tolist() == labels.tolist()
