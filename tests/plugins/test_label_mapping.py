"""All-to-all backdoors are found, with the whole mapping; other networks have no such trigger."""

import numpy as np
import pytest
import torch
from backdoorscan_plugins.label_mapping import LabelMapping

from backdoorscan import policy
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Unit, Verdict
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted, planted_pairs, run_detector
from backdoorscan.trigger import Trigger


def test_a_trained_all_to_all_backdoor_is_found_with_its_mapping(trained):
    net = trained("all-to-all")
    (evidence,), judgement = run_detector(LabelMapping(), net.classifier, net.images, Context())
    verdict, findings = policy.verdict([judgement], 0.01)
    assert verdict is Verdict.BACKDOORED
    assert sorted((f.source_label, f.target_label) for f in findings) == [(k, (k + 1) % 10) for k in range(10)]
    assert all(f.trigger.target == f.target_label and f.attack_success_rate >= 0.5 for f in findings)
    assert evidence.figures["held"]
    assert evidence.figures["success"] > 0.6
    assert evidence.triggers[0].target == -1
    assert evidence.gradient_samples <= 2 * 30 * 200


@pytest.mark.parametrize("attack", ["clean", "badnets"])
def test_other_trained_networks_have_no_such_trigger(trained, attack):
    net = trained(attack)
    _, judgement = run_detector(LabelMapping(), net.classifier, net.images, Context())
    assert policy.verdict([judgement], 0.01)[0] is Verdict.CLEAN


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_mapping_is_found(seed):
    leads_to = {label: (label + 2) % 5 for label in range(5)}
    classifier, images, _ = planted_pairs(leads_to, classes=5, blocks=3, count=60)
    _, judgement = run_detector(LabelMapping(restarts=6), classifier, images, Context(seed=seed))
    assert judgement.p_value < 0.01
    assert len(judgement.findings) >= 4
    assert {f.source_label: f.target_label for f in judgement.findings}.items() <= leads_to.items()


@pytest.mark.parametrize("target", [None, 2])
def test_planted_networks_without_a_mapping_have_none(target):
    classifier, images, _ = planted(target, classes=5, blocks=3, count=60)
    _, judgement = run_detector(LabelMapping(restarts=6), classifier, images, Context())
    assert judgement.p_value > 0.05


def test_it_does_not_run_on_some_labels_only(triple):
    classifier, images, _ = triple(None)
    _, judgement = run_detector(LabelMapping(), classifier, images, Context(labels=(0, 1, 2)))
    assert judgement.p_value is None
    assert "Too few" in judgement.note


def test_images_of_two_classes_are_too_few(triple):
    classifier, images, _ = triple(None)
    few = images.take(np.flatnonzero(images.labels < 2))
    (evidence,), judgement = run_detector(LabelMapping(), classifier, few, Context())
    assert evidence.figures == {"classes": 2}
    assert evidence.gradient_samples == 0
    assert judgement.p_value is None


def test_images_that_the_network_mistakes_are_not_searched_with(triple):
    classifier, images, _ = triple(None)
    labels = images.labels.copy()
    labels[:30] = (labels[:30] + 1) % 5
    mixed = LabelledImages(images.pixels, labels, "half of them wrong")
    settings = {"free_steps": 3, "steps": 3}
    (evidence,), _ = run_detector(LabelMapping(**settings), classifier, mixed, Context())
    assert evidence.figures["classes"] == 5
    assert evidence.gradient_samples == 6 * 2 * 30


def test_it_needs_images(triple):
    classifier, _, _ = triple(None)
    with pytest.raises(MethodError, match="needs images"):
        LabelMapping().examine(Unit("all classes", (0, 1, 2, 3, 4)), classifier, None, Context())


def evidence(statistic: float) -> Evidence:
    figures = {
        "statistic": statistic,
        "mapping": {"0": 1, "1": 2, "2": 0},
        "success_per_class": {"0": 1.0, "1": 0.9, "2": 0.4},
    }
    return Evidence(figures=figures, triggers=[Trigger(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), target=-1)])


def test_the_larger_the_statistic_the_smaller_the_p_value():
    p_values = [LabelMapping().judge([evidence(value)]).p_value for value in (0.0, 1.0, 2.0, 4.0)]
    assert p_values == sorted(p_values, reverse=True)
    assert p_values[0] > 0.5
    assert p_values[-1] < 1e-4


def test_findings_are_the_classes_that_arrive():
    judgement = LabelMapping().judge([evidence(4.0)])
    assert [(f.source_label, f.target_label) for f in judgement.findings] == [(0, 1), (1, 2)]
    assert [f.attack_success_rate for f in judgement.findings] == [1.0, 0.9]
    lost = Evidence(figures=evidence(4.0).figures)
    assert LabelMapping().judge([lost]).p_value == 1.0  # no trigger held
