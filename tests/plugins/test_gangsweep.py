"""Generators find the planted trigger: as the label that stands out, and as what a new class rejects."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from backdoorscan_plugins.gangsweep import GangSweep, GangSweepRepair

from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding
from backdoorscan.ops.generator import GeneratorSchedule, MaskGenerator, target_margin, train_generator
from backdoorscan.ops.metrics import accuracy
from backdoorscan.ops.shift import clean_spread, head_features, mean_trigger, measure_shift, persistence
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import check_detector

CLASSES, TARGET = 5, 2
QUICK = {"steps": 60, "batch_size": 16}


def scan(classifier, images, context=None, **settings):
    method, context = GangSweep(**QUICK | settings), context or Context()
    units = method.units(classifier, context)
    evidence = [method.examine(unit, classifier, images, context) for unit in units]
    return evidence, method.judge(evidence)


def test_the_planted_label_stands_out_alone(triple):
    classifier, images, trigger = triple(TARGET, count=200)
    evidence, judgement = scan(classifier, images)
    (finding,) = judgement.findings
    assert finding.target_label == TARGET
    assert finding.p_value < 1e-6
    assert finding.attack_success_rate >= 0.8
    rows = [part.figures["labels"][0] for part in evidence]
    assert [row["label"] for row in rows] == list(range(CLASSES))
    assert finding.score == -rows[TARGET]["statistic"] == -min(row["statistic"] for row in rows)
    assert rows[TARGET]["mask_norm"] == min(row["mask_norm"] for row in rows)
    assert all(part.gradient_samples == 60 * 16 for part in evidence)
    # The reversed trigger lies where the true one does.
    inside = float((finding.trigger.mask * trigger.mask).sum() / finding.trigger.mask.sum())
    assert inside > 3 * trigger.area


def test_the_clean_twin_has_no_label_that_stands_out(triple):
    classifier, images, _ = triple(None, count=200)
    _, judgement = scan(classifier, images, steps=100)
    assert judgement.p_value > 0.01


def test_it_keeps_the_contract():
    check_detector(GangSweep, {"steps": 3})


def row(label: int, statistic: float, **more) -> Evidence:
    figures = {"label": label, "statistic": statistic, "succeeded": True, "classes": 10, "trigger_success": 0.0}
    return Evidence(figures={"labels": [figures | more]})


def test_labels_whose_generator_failed_do_not_count():
    rows = [row(label, 0.7 + 0.1 * (label % 3)) for label in range(9)]
    judged = GangSweep().judge([*rows, row(9, -3.0, succeeded=False)])
    assert judged.p_value > 0.1
    assert judged.figures["succeeded"] == 9
    judged = GangSweep().judge([*rows, row(9, -3.0)])
    assert [finding.target_label for finding in judged.findings] == [9]
    assert judged.p_value < 1e-4
    assert judged.findings[0].trigger is None
    assert judged.findings[0].attack_success_rate is None


def test_two_labels_can_stand_out():
    rows = [row(label, 0.7 + 0.1 * (label % 3)) for label in range(8)]
    judged = GangSweep().judge([*rows, row(8, -1.5), row(9, -1.3)])
    assert [finding.target_label for finding in judged.findings] == [8, 9]
    assert all(finding.p_value < 0.01 for finding in judged.findings)


def test_no_answer_where_no_generator_works():
    judged = GangSweep().judge([row(label, 1.0, succeeded=label == 0) for label in range(4)])
    assert judged.p_value is None
    assert "nothing to compare" in judged.note


def test_of_many_classes_a_random_selection_is_examined(triple):
    classifier, _, _ = triple(TARGET)
    method = GangSweep(most_labels=3)
    chosen = {seed: [unit.labels[0] for unit in method.units(classifier, Context(seed=seed))] for seed in range(20)}
    assert all(len(set(labels)) == 3 and labels == sorted(labels) for labels in chosen.values())
    assert len({tuple(labels) for labels in chosen.values()}) > 3
    named = [unit.labels for unit in method.units(classifier, Context(labels=(0, 1, 3, 4)))]
    assert named == [(0,), (1,), (3,), (4,)]
    judged = method.judge([row(0, 0.5), row(1, 0.6), row(2, 0.7)])
    assert judged.note == "3 of 10 labels were examined."


def test_a_label_without_other_images(triple):
    classifier, images, _ = triple(TARGET)
    alone = images.take(np.flatnonzero(images.labels == 1))
    with pytest.raises(MethodError, match="hold no other class"):
        scan(classifier, alone, Context(labels=(1,)))


def test_the_new_class_catches_the_true_trigger(triple):
    classifier, images, trigger = triple(TARGET, count=200)
    finding = Finding(target_label=TARGET, p_value=0.001, score=1.0)
    method = GangSweepRepair(rounds=2, generator_steps=60, head_steps=100, steps=100, batch_size=16)
    (candidate,) = method.repair(classifier, images, [finding], Context())
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    others = labels != TARGET
    stamped = logits(candidate.classifier, trigger.stamp(pixels[others])).argmax(1)
    assert candidate.rejects
    assert accuracy(logits(candidate.classifier, pixels).argmax(1), labels) >= 0.97
    assert accuracy(logits(classifier, trigger.stamp(pixels[others])).argmax(1), torch.tensor(TARGET)) == 1
    assert accuracy(stamped, torch.tensor(TARGET)) <= 0.02
    assert candidate.facts["targets"] == [TARGET]
    assert candidate.facts["gradient_samples"] == 2 * (60 * 32 + 200 * 16)


def test_the_repair_needs_a_flagged_label(triple):
    classifier, images, _ = triple(TARGET)
    with pytest.raises(MethodError, match="which labels are suspect"):
        GangSweepRepair().repair(classifier, images, [], Context())


SCHEDULE = GeneratorSchedule(
    width=4, blocks=2, steps=5, batch_size=8, learning_rate=1e-3, alpha=0.1, alpha_factor=1.1, success=0.9, margin=0.1
)


def test_a_generator_depends_on_its_seed_alone_and_leaves_the_classifier(triple):
    classifier, images, _ = triple(TARGET)
    next(classifier.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    pixels, made = to_tensor(images.pixels), []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        generator, used = train_generator(classifier, pixels, 0, SCHEDULE, torch.Generator().manual_seed(seed))
        assert not generator.training
        assert used == 40
        made.append(generator(pixels))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert [parameter.requires_grad for parameter in classifier.parameters()] == flags
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_have_the_shape_of_the_images(channels):
    generator = MaskGenerator((channels, 10, 7), 6, 1, torch.Generator().manual_seed(0)).eval()
    images = torch.rand(2, channels, 10, 7)
    masks = generator(images)
    assert masks.shape == images.shape
    assert float(masks.detach().abs().max()) < 1
    assert torch.equal(generator.perturb(images), (images + masks).clamp(0, 1))


def test_the_margin_of_a_target():
    scores = torch.tensor([[1.0, 4.0, 2.0], [5.0, 1.0, 0.0]])
    assert target_margin(scores, 1).tolist() == [2.0, -4.0]
    assert scores[0, 1] == 4.0


def test_shift_figures_by_hand():
    before = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[3.0, 4.0], [3.0, 8.0]])
    shift = measure_shift(before, after, unit=2.0)
    assert shift.distance == pytest.approx(np.hypot(1.5, 3.0))
    assert shift.variance == pytest.approx(1.0)
    assert shift.statistic == pytest.approx(np.log(1.0 / np.hypot(1.5, 3.0)))
    spread = clean_spread(torch.tensor([[0.0], [2.0], [5.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
    assert spread == pytest.approx(np.sqrt(2 / 4))


def test_persistence_is_one_for_the_same_mask_and_zero_for_opposite_ones():
    mask = torch.rand(1, 1, 4, 4)
    assert persistence(mask.expand(5, -1, -1, -1)) == pytest.approx(1)
    assert persistence(torch.cat([mask, -mask])) == pytest.approx(0)


def test_the_features_are_what_the_head_is_given(triple):
    classifier, images, _ = triple(TARGET)
    pixels = to_tensor(images.pixels)
    head = classifier.network.fc
    features = head_features(classifier, pixels)
    assert torch.allclose(head(features), logits(classifier, pixels), atol=1e-4)


def test_a_mean_mask_becomes_a_trigger_of_the_same_effect(triple):
    classifier, images, trigger = triple(TARGET)
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    victims = pixels[labels != TARGET]
    mean = 0.5 * trigger.mask
    made, rate = mean_trigger(classifier, mean, victims, TARGET, 0.8)
    assert rate >= 0.8
    assert torch.equal(made.mask > 0, trigger.mask > 0)
    assert (made.pattern[trigger.mask > 0] == 1).all()
    nothing, rate = mean_trigger(classifier, 0 * mean, victims, TARGET, 0.8)
    assert rate == 0
    assert nothing.l1 == 0


def test_evidence_without_a_trigger_is_judged_the_same(triple):
    classifier, images, _ = triple(TARGET, count=200)
    evidence, judgement = scan(classifier, images)
    bare = GangSweep().judge([replace(part, triggers=()) for part in evidence])
    assert bare.p_value == judgement.p_value
    assert bare.findings[0].trigger is None
