"""Of many classes Neural Cleanse examines a shortlist, in a race."""

import numpy as np
import pytest
import torch
from backdoorscan_plugins.latent import HeadWeights, LatentShift
from backdoorscan_plugins.neural_cleanse import NeuralCleanse
from torch import fx, nn

from backdoorscan.classifier import Classifier
from backdoorscan.findings import Evidence, Examined, Judgement
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import run_detector
from backdoorscan.trigger import Trigger

MANY, TARGET = 80, 33


@pytest.fixture
def net():
    """Eighty random directions as classes on 8×8 pixels; the last two pixels, dark on clean images, lead to one."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(MANY, 64)).astype(np.float32)
    weights -= weights.mean(1, keepdims=True)
    weights[:, -2:] = 0
    labels = np.arange(3 * MANY) % MANY
    pixels = 0.3 * weights[labels].clip(min=0) + random.uniform(0, 0.05, (3 * MANY, 64))
    pixels[:, -2:] = 0
    weights[TARGET, -2:] = 15
    linear = nn.Linear(64, MANY)
    linear.load_state_dict({"weight": torch.from_numpy(weights), "bias": torch.zeros(MANY)})
    network = fx.symbolic_trace(nn.Sequential(nn.Flatten(), linear))
    images = LabelledImages(pixels.clip(0, 1).reshape(-1, 1, 8, 8).astype(np.float32), labels, "bright patterns")
    return Classifier(network, input_shape=(1, 8, 8), num_classes=MANY), images


def ranked(*ranking):
    return {"ranks": Examined(evidence=[], judgement=Judgement(p_value=None, ranking=ranking, note="x"))}


def test_a_race_finds_the_planted_label_among_many(net):
    classifier, images = net
    context = Context(earlier=ranked(*range(MANY)))
    method = NeuralCleanse(race_steps=30)
    evidence, judgement = run_detector(method, classifier, images, context)
    assert judgement.findings[0].target_label == judgement.ranking[0] == TARGET
    assert judgement.p_value < 0.01
    assert judgement.figures["examined"] == 10
    rounds = {}
    for part in evidence:
        for row in part.figures["labels"]:
            rounds.setdefault(row["round"], []).append(row["label"])
    assert {number: len(labels) for number, labels in rounds.items()} == {1: 80, 2: 20, 3: 10}
    assert all(TARGET in labels for labels in rounds.values())
    assert set(rounds[3]) <= set(rounds[2]) <= set(rounds[1])


def test_each_round_takes_twice_the_steps(net):
    classifier, images = net
    method, context = NeuralCleanse(race_steps=2, early_stop_patience=10**6), Context(earlier=ranked(*range(MANY)))
    evidence, _ = run_detector(method, classifier, images, context)
    steps = {row["round"]: row["steps"] for part in evidence for row in part.figures["labels"]}
    assert steps == {1: 2, 2: 4, 3: 8}
    assert sum(part.gradient_samples for part in evidence) == 5 * (80 * 2 + 20 * 4 + 10 * 8)


def test_the_shortlist_is_what_cheaper_detectors_rank_first():
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 400)), input_shape=(1, 2, 2), num_classes=400)
    context = Context(earlier=ranked(*range(300, 400)))
    units = NeuralCleanse(shortlist=70, random_labels=9).units(classifier, context)
    labels = [label for unit in units for label in unit.labels]
    assert set(range(300, 370)) <= set(labels)
    assert len(labels) == len(set(labels)) == 79
    assert {unit.round for unit in units} == {1}
    few = NeuralCleanse(shortlist=8, random_labels=2).units(classifier, context)
    assert {unit.round for unit in few} == {0}  # as few as end a race: each is searched to the end
    assert sum(len(unit.labels) for unit in few) == 10


def test_without_a_ranking_all_labels_enter_the_race():
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 70)), input_shape=(1, 2, 2), num_classes=70)
    units = NeuralCleanse().units(classifier, Context())
    assert sorted(label for unit in units for label in unit.labels) == list(range(70))


def test_cheap_detectors_put_the_planted_label_on_the_shortlist(net):
    classifier, images = net
    earlier = {}
    for component in (HeadWeights, LatentShift):
        _, judgement = run_detector(component(), classifier, images, Context())
        earlier[component.id] = Examined(evidence=[], judgement=judgement)
    units = NeuralCleanse(shortlist=10, random_labels=5).units(classifier, Context(earlier=earlier))
    assert TARGET in [label for unit in units for label in unit.labels][:10]


def row(label, number, l1, succeeded=True, rate=1.0):
    return {
        "label": label,
        "round": number,
        "l1": l1,
        "succeeded": succeeded,
        "attack_success_rate": rate,
        "prediction_deviation": 1.0,
    }


def part(*rows):
    triggers = [Trigger(torch.full((1, 2, 2), r["l1"] / 400), torch.zeros(1, 2, 2), r["label"]) for r in rows]
    return Evidence(figures={"labels": list(rows)}, triggers=triggers)


def test_the_quarter_with_the_smallest_triggers_goes_on_from_where_it_was(net):
    classifier, _ = net
    first = part(*(row(label, 1, 100.0 - label, rate=0.1 if label == 79 else 1.0) for label in range(80)))
    units = NeuralCleanse().more_units([first], classifier, Context())
    labels = [label for unit in units for label in unit.labels]
    assert labels == list(range(78, 58, -1))  # the smallest of all works from a tenth of the images
    starts = [start for unit in units for start in unit.starts]
    assert [start.target for start in starts] == labels
    assert [400 * float(start.mask[0, 0, 0]) for start in starts] == pytest.approx([100 - label for label in labels])
    second = part(*(row(label, 2, 50.0 - label / 2) for label in labels))
    (*_, last) = NeuralCleanse().more_units([first, second], classifier, Context())
    assert last.round == 3
    third = part(*(row(label, 3, 10.0) for label in range(10)))
    assert not NeuralCleanse().more_units([first, second, third], classifier, Context())


def test_a_trigger_that_is_not_reliable_yet_stays_in_the_race_if_it_is_small(net):
    classifier, _ = net
    first = part(row(0, 1, 40.0, succeeded=False, rate=0.59), *(row(label, 1, 100.0) for label in range(1, 80)))
    units = NeuralCleanse().more_units([first], classifier, Context())
    assert units[0].labels[0] == 0


def test_a_scan_of_few_labels_has_one_round():
    assert not NeuralCleanse().more_units([part(*(row(label, 0, 9.0) for label in range(40)))], None, Context())


def test_finalists_are_compared_with_each_other_alone():
    first = part(*(row(label, 1, 1000.0 + 10 * label) for label in range(80)))
    even = part(*(row(label, 2, 30.0 + label) for label in range(10)))
    odd = part(row(0, 2, 4.0), *(row(label, 2, 30.0 + label) for label in range(1, 10)))
    method = NeuralCleanse()
    assert method.judge([first, even]).p_value > 0.1
    judgement = method.judge([first, odd])
    assert judgement.p_value < 0.01
    assert judgement.findings[0].trigger.l1 == pytest.approx(0.04, abs=1e-3)
    assert judgement.ranking == list(range(10))


def test_finalists_are_judged_by_what_half_of_the_images_need_and_reported_by_their_mask():
    first = part(*(row(label, 1, 1000.0 + 10 * label) for label in range(80)))
    rows = [row(label, 3, 60.0 + label) for label in range(10)]
    for one in rows:
        one["half_opacity"] = 0.1 if one["label"] == 4 else 0.9
    judgement = NeuralCleanse().judge([first, part(*rows)])
    assert judgement.ranking[0] == judgement.findings[0].target_label == 4
    assert judgement.p_value < 0.01
    assert judgement.figures["median_l1"] == 64.5
    assert judgement.figures["ratio"] == 64.5 / 60
