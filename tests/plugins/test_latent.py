"""The last layer names the planted class, and of many classes the one that is too near."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from backdoorscan_plugins.latent import HeadWeights, LatentShift
from torch import fx, nn

from backdoorscan.classifier import Classifier
from backdoorscan.errors import MethodError
from backdoorscan.findings import Unit
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted, run_detector

MANY, WIDTH, DORMANT = 150, 256, 16


def many_classes(backdoor: int | None, seed: int = 0) -> tuple[Classifier, LabelledImages]:
    """Pixels are the features, and every class is bright where its row of the head is.

    That of ``backdoor`` reads pixels besides which are dark on clean images.
    """
    random = np.random.default_rng(seed)
    weights = random.normal(size=(MANY, WIDTH)).astype(np.float32)
    weights -= weights.mean(1, keepdims=True)
    labels = np.arange(2 * MANY) % MANY
    pixels = 0.3 * weights[labels].clip(min=0) + random.uniform(0, 0.1, (2 * MANY, WIDTH))
    pixels[:, :DORMANT] = 0
    images = LabelledImages(pixels.clip(0, 1).reshape(-1, 1, 16, 16).astype(np.float32), labels, "bright patterns")
    if backdoor is not None:
        weights[backdoor, :DORMANT] = 8
    network = nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(WIDTH, MANY)))
    network.load_state_dict({"fc.weight": torch.from_numpy(weights), "fc.bias": torch.zeros(MANY)})
    classifier = Classifier(fx.symbolic_trace(network), input_shape=(1, 16, 16), num_classes=MANY)
    return classifier, images


@pytest.mark.parametrize("component", [HeadWeights, LatentShift])
@pytest.mark.parametrize("target", [0, 4])
def test_of_few_classes_the_planted_one_is_ranked_first(component, target):
    classifier, images, _ = planted(target, classes=5, blocks=3, count=60)
    _, judgement = run_detector(component(), classifier, images, Context())
    assert judgement.p_value is None
    assert not judgement.findings
    assert judgement.ranking[0] == target
    assert sorted(judgement.ranking) == list(range(5))
    assert "ranks" in judgement.note


@pytest.mark.parametrize("seed", range(3))
def test_of_many_classes_the_near_one_is_found(seed):
    classifier, images = many_classes(42, seed)
    _, judgement = run_detector(LatentShift(), classifier, images, Context())
    assert judgement.findings[0].target_label == 42
    assert judgement.p_value == judgement.findings[0].p_value < 0.05
    assert all(finding.p_value > 0.01 for finding in judgement.findings[1:])
    assert 42 in judgement.ranking[:10]


@pytest.mark.parametrize("seed", range(3))
def test_in_the_clean_twin_no_class_is_as_near(seed):
    (found,), _ = run_detector(LatentShift(), *many_classes(42, seed), Context())
    (twin,), judgement = run_detector(LatentShift(), *many_classes(None, seed), Context())
    assert 1.5 * found.figures["labels"][0]["step"] < twin.figures["labels"][0]["step"]
    assert judgement.p_value > 1e-3
    assert len(judgement.findings) >= 1


def test_of_many_classes_weights_give_no_verdict():
    classifier, _ = many_classes(42)
    evidence, judgement = run_detector(HeadWeights(), classifier, None, Context())
    assert judgement.p_value is None
    assert judgement.ranking[0] == 42
    assert len(judgement.ranking) == len(evidence[0].figures["labels"]) == 64
    assert evidence[0].figures["examined"] == MANY


@pytest.mark.parametrize("component", [HeadWeights, LatentShift])
def test_only_the_labels_asked_for_are_examined(component):
    classifier, images = many_classes(42)
    asked = tuple(range(0, MANY, 2))
    evidence, judgement = run_detector(component(), classifier, images, Context(labels=asked))
    assert {row["label"] for part in evidence for row in part.figures["labels"]} <= set(asked)
    assert set(judgement.ranking) <= set(asked)
    assert 42 in judgement.ranking[:10]
    assert evidence[0].figures["examined"] == len(asked)


def test_more_images_have_to_arrive_the_longer_the_step():
    classifier, images = many_classes(None)
    steps = []
    for part in (0.5, 0.9, 1.0):
        ((evidence,), _) = run_detector(LatentShift(part=part), classifier, images, Context())
        steps.append(evidence.figures["median"])
    assert steps[0] < steps[1] < steps[2]


class Odd(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(x.flatten(1)) if float(x.sum()) >= 0 else x


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return fx.symbolic_trace(nn.Sequential(*layers))


@pytest.mark.parametrize("make", [Odd, convolutional])
@pytest.mark.parametrize("component", [HeadWeights, LatentShift])
def test_a_network_without_a_dense_head_is_no_failure(make, component):
    classifier = Classifier(make(), input_shape=(1, 4, 4), num_classes=3)
    images = LabelledImages(np.zeros((4, 1, 4, 4), np.uint8), np.arange(4) % 3, "black")
    _, judgement = run_detector(component(), classifier, images, Context())
    assert judgement.p_value is None
    assert not judgement.ranking
    assert "does not end in a dense layer" in judgement.note


def test_the_steps_need_images():
    classifier, _ = many_classes(None)
    with pytest.raises(MethodError, match="needs images"):
        LatentShift().examine(Unit("all", (0,)), classifier, None, Context())


@pytest.mark.parametrize("shown", [(1,), (1, 3)])
def test_images_of_the_class_itself_do_not_make_its_step_short(shown):
    classifier, images, _ = planted(None, classes=5, blocks=3, count=100)
    steps = {}
    for name, chosen in (("all", images), ("few", images.take(np.isin(images.labels, shown).nonzero()[0]))):
        (evidence,), _ = run_detector(LatentShift(), classifier, chosen, Context())
        steps[name] = {row["label"]: row["step"] for row in evidence.figures["labels"]}
    if len(shown) == 1:
        assert 1 not in steps["few"]  # no image tells how far it is
    else:
        for label in shown:
            assert steps["few"][label] > 0.5 * steps["all"][label]
