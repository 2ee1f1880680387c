"""Unlearning reversed triggers, and known poisoned images with their true labels."""

import numpy as np
import pytest
import torch
from backdoorscan_plugins import unlearning
from backdoorscan_plugins.unlearning import Unlearn

from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import accuracy, attack_success_rate
from backdoorscan.plugin.method import Context

TARGET = 2
QUICK = {"sample": 2400, "batch_size": 16, "rate": 0.03}


@pytest.fixture
def model(triple):
    """A backdoored network, clean images, the trigger, and images that carry it under their true labels."""
    classifier, images, trigger = triple(TARGET, count=200)
    stamped = trigger.stamp(to_tensor(images.pixels)).numpy()
    return classifier, images, trigger, LabelledImages(stamped, images.labels, "poisoned")


def effect(network, images, poisoned) -> tuple[float, float]:
    """Clean accuracy and true attack success."""
    clean, attacked = (logits(network, to_tensor(part.pixels)).argmax(1) for part in (images, poisoned))
    labels = torch.from_numpy(images.labels)
    return accuracy(clean, labels), attack_success_rate(attacked, labels, TARGET)


@pytest.mark.parametrize("labels", ["true", "soft"])
def test_known_poisoned_images_with_their_true_labels_need_no_findings(model, labels, monkeypatch):
    classifier, images, _, poisoned = model
    monkeypatch.setattr(unlearning, "_reverse_again", None)  # who reverses triggers fails
    assert effect(classifier, images, poisoned) == (1, 1)
    method = Unlearn(**QUICK, labels=labels)
    (candidate,) = method.repair(classifier, images, [], Context(poisoned=poisoned))
    after = effect(candidate.classifier, images, poisoned)
    assert after[0] >= 0.97
    assert after[1] <= 0.05
    assert candidate.facts["poisoned_images"] == 200
    assert (candidate.facts["triggers"], candidate.facts["targets"]) == (0, [])
    assert not candidate.rejects


def test_it_ends_when_the_attack_is_forgotten(model):
    classifier, images, _, poisoned = model
    rounds = {
        limit: Unlearn(**QUICK, rounds=3, left_over=limit)
        .repair(classifier, images, [], Context(poisoned=poisoned))[0]
        .facts["rounds"]
        for limit in (0.05, 1.0)
    }
    assert rounds[1.0] == 1
    idle = Unlearn(sample=16, rate=1e-6, rounds=3).repair(classifier, images, [], Context(poisoned=poisoned))[0]
    assert idle.facts["rounds"] == 3
    assert rounds[0.05] < 3


def test_poisoned_images_and_triggers_share_the_places(model):
    classifier, images, trigger, poisoned = model
    blank = LabelledImages(np.zeros_like(poisoned.pixels), np.full(200, 4), "blank")
    for findings, counts in (([], (8, 0)), ([trigger], (4, 4))):
        batches = Unlearn(ratio=0.5, batch_size=16)._batches(
            classifier, images, findings, blank, torch.Generator().manual_seed(0)
        )
        pixels, labels = next(batches)
        known = (pixels.flatten(1) == 0).all(1)
        assert known.sum() == counts[0]
        assert (labels[known] == 4).all()
        where = trigger.mask[0] > 0.99
        stamped = (pixels[:, :, where] == trigger.pattern[:, where]).flatten(1).all(1)
        assert stamped.sum() == counts[1]
        assert len(pixels) == len(labels) == 16


def test_reversed_triggers_are_used_beside_poisoned_images(model):
    classifier, images, trigger, poisoned = model
    finding = Finding(target_label=TARGET, p_value=0.001, score=5.0, trigger=trigger)
    method = Unlearn(**QUICK, rounds=1)
    (candidate,) = method.repair(classifier, images, [finding], Context(poisoned=poisoned))
    assert (candidate.facts["triggers"], candidate.facts["poisoned_images"]) == (1, 200)
    assert effect(candidate.classifier, images, poisoned)[1] <= 0.05


@pytest.mark.parametrize("label", ["target", "answers"])
def test_labels_of_the_target_are_refused(model, label):
    classifier, images, _, poisoned = model
    answers = logits(classifier, to_tensor(poisoned.pixels)).argmax(1).numpy()
    labels = np.full(200, TARGET) if label == "target" else answers
    planted = LabelledImages(poisoned.pixels, labels, "poisoned.h5")
    with pytest.raises(MethodError, match=r"labels of poisoned\.h5 are what the network answers"):
        Unlearn(**QUICK).repair(classifier, images, [], Context(poisoned=planted))


def test_one_true_label_for_all_is_learnt(model):
    """A backdoor may work from one class alone: then all true labels are that class."""
    classifier, images, _, poisoned = model
    victims = poisoned.take(np.flatnonzero(poisoned.labels == 4))
    (candidate,) = Unlearn(**QUICK, rounds=1).repair(classifier, images, [], Context(poisoned=victims))
    answers = logits(candidate.classifier, to_tensor(victims.pixels)).argmax(1)
    assert accuracy(answers, torch.tensor(4)) >= 0.9


def test_neither_triggers_nor_poisoned_images(model):
    classifier, images, _, _ = model
    with pytest.raises(MethodError, match="unlearn needs reversed triggers"):
        Unlearn().repair(classifier, images, [], Context())
