"""The head grows by one class, and the network learns to answer it for backdoored images."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from backdoorscan_plugins.retrain import Retrain
from torch import fx, nn

from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import accuracy
from backdoorscan.ops.rejecting import grow_head, moved
from backdoorscan.plugin.method import Context
from backdoorscan.trigger import Trigger

CLASSES, TARGET = 5, 2
QUICK = {"head_steps": 100, "steps": 100, "batch_size": 16}


@pytest.fixture
def model(triple):
    classifier, images, trigger = triple(TARGET, count=200)
    finding = Finding(target_label=TARGET, p_value=0.001, score=5.0, trigger=trigger)
    return classifier, images, finding


def answers(network, pixels) -> torch.Tensor:
    return logits(network, pixels).argmax(1)


def shares(network, images, trigger) -> dict[str, float]:
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    others = labels != TARGET
    clean, stamped = answers(network, pixels), answers(network, trigger.stamp(pixels[others]))
    return {
        "accuracy": accuracy(clean, labels),
        "obeyed": accuracy(stamped, torch.tensor(TARGET)),
        "caught": accuracy(stamped, torch.tensor(CLASSES)),
    }


def test_stamped_images_are_rejected_and_clean_ones_kept(model):
    classifier, images, finding = model
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    assert shares(classifier, images, finding.trigger) == {"accuracy": 1, "obeyed": 1, "caught": 0}
    (candidate,) = Retrain(**QUICK).repair(classifier, images, [finding], Context())
    after = shares(candidate.classifier, images, finding.trigger)
    assert after["accuracy"] >= 0.98
    assert after["obeyed"] <= 0.02
    assert after["caught"] >= 0.98
    assert candidate.rejects
    assert candidate.classifier.num_classes == CLASSES + 1
    assert not candidate.classifier.network.training
    assert candidate.facts["triggers"] == 1
    assert candidate.facts["targets"] == [TARGET]
    assert candidate.facts["steps"] == 200
    assert candidate.facts["gradient_samples"] == 200 * 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


def test_known_poisoned_images_serve_instead_of_triggers(model):
    classifier, images, finding = model
    stamped = finding.trigger.stamp(to_tensor(images.pixels)).numpy()
    poisoned = LabelledImages(stamped, np.full(len(images), TARGET), "poisoned")
    (candidate,) = Retrain(**QUICK).repair(classifier, images, [], Context(poisoned=poisoned))
    after = shares(candidate.classifier, images, finding.trigger)
    assert after["accuracy"] >= 0.98
    assert after["caught"] >= 0.98
    assert candidate.facts["poisoned_images"] == len(images)
    assert candidate.facts["triggers"] == 0


def test_every_flagged_label_is_learnt(model):
    classifier, images, finding = model
    trigger = finding.trigger
    other = Trigger(trigger.mask.flip(1, 2), trigger.pattern.flip(1, 2), 4)
    findings = [finding, replace(finding, target_label=4, trigger=other)]
    (candidate,) = Retrain(**QUICK).repair(classifier, images, findings, Context())
    assert candidate.facts["targets"] == [TARGET, 4]
    for shown in (trigger, other):
        assert shares(candidate.classifier, images, shown)["caught"] >= 0.95


def test_without_training_nothing_but_the_head_changes_and_no_answer_does(model):
    classifier, images, finding = model
    (candidate,) = Retrain(head_steps=0, steps=0).repair(classifier, images, [finding], Context())
    pixels = to_tensor(images.pixels)
    assert torch.equal(answers(candidate.classifier, pixels), answers(classifier, pixels))


def test_the_bias_of_the_new_class_is_lowered_until_it_takes_few_clean_images(model):
    """A poison that does nothing teaches to reject clean images: only the limit keeps them."""
    classifier, images, finding = model
    idle = replace(finding, trigger=Trigger(torch.zeros(1, 12, 12), torch.zeros(1, 12, 12), TARGET))
    pixels = to_tensor(images.pixels)
    rejected = {}
    for limit in (0.0, 1.0):
        method = Retrain(**QUICK, share=0.9, false_rejects=limit)
        (candidate,) = method.repair(classifier, images, [idle], Context())
        rejected[limit] = accuracy(answers(candidate.classifier, pixels), torch.tensor(CLASSES))
    assert rejected[1.0] > 0.9
    assert rejected[0.0] < 0.2


def test_the_same_seed_gives_the_same_network(model):
    classifier, images, finding = model
    one, same, other = (
        Retrain(**QUICK).repair(classifier, images, [finding], Context(seed=seed))[0].classifier.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_neither_triggers_nor_poisoned_images(model):
    classifier, images, finding = model
    for findings in ([], [replace(finding, trigger=None)]):
        with pytest.raises(MethodError, match="--poisoned"):
            Retrain().repair(classifier, images, findings, Context())


def classifier_of(head: nn.Module, *tail: nn.Module, classes: int = 3, binary: bool = False) -> Classifier:
    body = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), head=head))
    network = nn.Sequential(OrderedDict(body=body, tail=nn.Sequential(*tail))).eval()
    return Classifier(fx.symbolic_trace(network), input_shape=(1, 8, 8), num_classes=classes, binary=binary)


def dense(outputs: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


@pytest.mark.parametrize(
    "classifier",
    [
        classifier_of(dense(3)),
        classifier_of(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        classifier_of(nn.Conv2d(4, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
    ids=["dense", "convolution", "no bias"],
)
def test_a_grown_head_keeps_all_weights_and_answers(classifier):
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    grown, name = grow_head(classifier)
    after = grown.state_dict()
    assert name.startswith("body.head")
    for key, tensor in before.items():
        rows = after[key][:-1] if key.startswith(f"network.{name}.") else after[key]
        assert torch.equal(rows, tensor), key
        assert torch.equal(classifier.state_dict()[key], tensor), key
        assert after[key].data_ptr() != classifier.state_dict()[key].data_ptr()
    pixels = torch.rand(20, 1, 8, 8)
    scores, expected = logits(grown, pixels), logits(classifier, pixels)
    assert scores.shape == (20, 4)
    assert torch.allclose(scores[:, :3], expected, atol=1e-6)
    assert (scores.argmax(1) < 3).all()


def test_a_network_with_one_output_is_refused():
    with pytest.raises(MethodError, match="single output"):
        grow_head(classifier_of(dense(1), classes=2, binary=True))


@pytest.mark.parametrize(
    "classifier",
    [
        classifier_of(nn.Conv2d(4, 3, 6), nn.Flatten()),
        classifier_of(dense(6), nn.Unflatten(1, (3, 2)), nn.MaxPool1d(2), nn.Flatten()),
        classifier_of(dense(3), nn.BatchNorm1d(3)),
    ],
    ids=["3×3 kernel", "more outputs than classes", "a layer behind it for three classes"],
)
def test_other_heads_are_refused(classifier):
    with pytest.raises(MethodError, match="cannot be given one class more"):
        grow_head(classifier)


def test_a_moved_trigger_keeps_its_shape_inside_the_image():
    mask, pattern = torch.zeros(1, 6, 6), torch.zeros(3, 6, 6)
    mask[:, 2, 3], pattern[:, 2, 3] = 0.7, 0.4
    random, places = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        trigger = moved(Trigger(mask, pattern, 1), 1, random)
        ((_, row, column),) = trigger.mask.nonzero().tolist()
        assert trigger.mask[0, row, column] == mask.max()
        assert torch.equal(trigger.pattern[:, row, column], torch.full((3,), 0.4))
        places.add((row, column))
    assert places == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4)}
