"""Patterns and warpings over the whole image lead to the attacked label most easily."""

import numpy as np
import pytest
from backdoorscan_plugins.perturbations import UniversalPerturbation, WarpInversion, reached_sizes

from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Unit
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted, run_detector

KINDS = [UniversalPerturbation, WarpInversion]


@pytest.mark.parametrize(("kind", "attack"), [(UniversalPerturbation, "blended"), (WarpInversion, "warping")])
def test_the_attacked_label_is_the_most_suspicious(trained, kind, attack):
    net = trained(attack)
    (evidence,), judgement = run_detector(kind(), net.classifier, net.images, Context())
    assert judgement.ranking[0] == judgement.findings[0].target_label == net.aim.target
    row = evidence.figures["labels"][net.aim.target]
    assert row["succeeded"]
    assert row["success"] > 0.6
    clean = trained("clean")
    _, judgement = run_detector(kind(), clean.classifier, clean.images, Context())
    assert judgement.p_value > 0.01


def test_a_pattern_that_works_is_given_as_a_trigger(triple):
    classifier, images, _ = triple(2)
    (evidence,), judgement = run_detector(UniversalPerturbation(), classifier, images, Context())
    finding = judgement.findings[0]
    assert finding.target_label == finding.trigger.target == 2
    assert judgement.p_value < 0.05
    pixels, labels = to_tensor(images.pixels), images.labels
    stamped = logits(classifier, finding.trigger.stamp(pixels[labels != 2])).argmax(1)
    assert (stamped == 2).float().mean() > 0.7
    assert 0 <= evidence.figures["labels"][2]["success"] <= 1


def test_a_warping_gives_no_trigger():
    classifier, images, _ = planted(2)
    (evidence,), judgement = run_detector(WarpInversion(), classifier, images, Context())
    assert not evidence.triggers
    assert all(finding.trigger is None for finding in judgement.findings)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_come_in_groups_and_none_where_there_are_many(kind, triple):
    classifier, _, _ = triple(None, classes=15)
    method = kind()
    assert [unit.labels for unit in method.units(classifier, Context())] == [tuple(range(10)), tuple(range(10, 15))]
    assert [unit.labels for unit in method.units(classifier, Context(labels=(3, 1)))] == [(3, 1)]
    classifier.num_classes = 65
    assert method.units(classifier, Context()) == []
    judgement = method.judge([])
    assert judgement.p_value is None
    assert judgement.note


@pytest.mark.parametrize("kind", KINDS)
def test_it_needs_images_of_several_classes(kind, triple):
    classifier, images, _ = triple(None)
    with pytest.raises(MethodError, match="needs images"):
        kind().examine(Unit("x", (0, 1)), classifier, None, Context())
    alone = images.take(np.flatnonzero(images.labels == 1))
    with pytest.raises(MethodError, match="cannot examine label 1"):
        kind().examine(Unit("x", (0, 1)), classifier, alone, Context())


def evidence(*sizes, failed=()):
    rows = [
        {"label": label, "size": size, "succeeded": label not in failed, "success": 0.9}
        for label, size in enumerate(sizes)
    ]
    return [Evidence(figures={"labels": rows})]


def test_a_much_smaller_size_stands_out():
    method = UniversalPerturbation()
    judgement = method.judge(evidence(3.0, 3.3, 0.3, 2.8, 3.1, 2.9, 3.4, 3.0, 2.7, 3.2))
    assert judgement.p_value == judgement.findings[0].p_value < 0.01
    assert judgement.findings[0].target_label == judgement.ranking[0] == 2
    assert sorted(judgement.ranking) == list(range(10))
    even = method.judge(evidence(3.0, 3.3, 2.6, 2.8, 3.1, 2.9, 3.4, 3.0, 2.7, 3.2))
    assert even.p_value > 0.1


def test_a_label_that_was_not_reached_is_not_small():
    method = UniversalPerturbation()
    sizes = (3.0, 3.3, 0.3, 2.8, 3.1, 2.9, 3.4, 3.0, 2.7, 3.2)
    assert method.judge(evidence(*sizes, failed=[2])).p_value > 0.1
    rows = evidence(1.0, 2.0, 4.0, failed=[0])[0].figures["labels"]
    assert np.exp(reached_sizes(rows)).tolist() == pytest.approx([4.0, 2.0, 4.0])


@pytest.mark.parametrize("rows", [evidence(1.0, 2.0), evidence(1.0, 2.0, 3.0, failed=[0, 1, 2])])
def test_too_few_labels_to_compare(rows):
    judgement = UniversalPerturbation().judge(rows)
    assert judgement.p_value is None
    assert "too few" in judgement.note
