"""Source-specific backdoors are found as a pair; look-alikes in clean networks are not."""

import numpy as np
import pytest
import torch
from backdoorscan_plugins.attacks.patches import SourceSpecific
from backdoorscan_plugins.source_pairs import SourcePairs

from backdoorscan import policy
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Unit, Verdict
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted_pairs, run_detector
from backdoorscan.trigger import Trigger


def test_the_pair_of_a_trained_backdoor_is_the_most_suspicious(trained):
    net = trained("source-specific")
    pair = (SourceSpecific().source(net.aim), net.aim.target)
    evidence, judgement = run_detector(SourcePairs(), net.classifier, net.images, Context())
    first = judgement.findings[0]
    assert (first.source_label, first.target_label) == pair
    assert first.trigger.target == net.aim.target
    assert first.attack_success_rate > 0.6
    assert [part.figures["labels"][0]["round"] for part in evidence] == [1, 1, 2, 2, 3]
    row = next(r for r in evidence[-1].figures["labels"] if (r["source"], r["label"]) == pair)
    assert row["kept"] > 0.8  # other classes are left alone
    clean = trained("clean")
    _, judgement = run_detector(SourcePairs(), clean.classifier, clean.images, Context())
    assert policy.verdict([judgement], 0.01)[0] is Verdict.CLEAN
    assert judgement.p_value > 10 * first.p_value
    assert judgement.findings[0].score < first.score


def test_the_planted_pair_is_found_by_most_searches_and_no_other():
    classifier, images, trigger = planted_pairs({3: 1})
    found = []
    for seed in range(3):
        _, judgement = run_detector(SourcePairs(), classifier, images, Context(seed=seed))
        _, findings = policy.verdict([judgement], 0.01)
        found += findings
    # One random start per pair does not always see the trigger.
    assert len(found) >= 2
    assert {(f.source_label, f.target_label) for f in found} == {(3, 1)}
    assert all(f.trigger.l1 < trigger.l1 for f in found)


def test_all_pairs_are_looked_at_and_each_round_keeps_some(triple):
    classifier, images, _ = triple(None)
    method, context = SourcePairs(steps=(2, 4, 8), stay=(7, 3)), Context()
    units = method.units(classifier, context)
    pairs = [pair for unit in units for pair in zip(unit.sources, unit.labels, strict=True)]
    assert sorted(pairs) == [(a, b) for a in range(5) for b in range(5) if a != b]
    evidence, counts = [], []
    while units:
        evidence += [method.examine(unit, classifier, images, context) for unit in units]
        counts.append(sum(len(unit.labels) for unit in units))
        units = method.more_units(evidence, classifier, context)
    assert counts == [20, 7, 3]
    # As many images of the source as of others.
    batch = [4, 8, 10]
    assert sum(part.gradient_samples for part in evidence) == sum(
        pairs * 2 * 2**number * batch[number] for number, pairs in enumerate(counts)
    )
    last = evidence[-1].figures["labels"]
    assert all("transfer" in row and row["round"] == 3 for row in last)


def row(source, label, number, l1, **more):
    figures = {"loss": 1.0, "area": l1 / 4, "succeeded": True}
    return {"source": source, "label": label, "round": number, "l1": l1, **figures, **more}


def part(*rows):
    triggers = [Trigger(torch.full((1, 2, 2), r["l1"] / 4), torch.zeros(1, 2, 2), r["label"]) for r in rows]
    return Evidence(figures={"labels": list(rows)}, triggers=triggers)


def test_the_next_round_goes_on_from_the_latest_triggers(triple):
    classifier, _, _ = triple(None)
    method = SourcePairs(stay=(3, 2))
    first = part(row(0, 1, 1, 3.0), row(1, 2, 1, 2.0), row(2, 0, 1, 1.0))
    second = part(row(0, 1, 2, 0.5), row(1, 2, 2, 1.5, succeeded=False), row(2, 0, 2, 0.9))
    (unit,) = method.more_units([first, second], classifier, Context())
    assert (unit.round, unit.sources, unit.labels) == (3, (0, 2), (1, 0))
    assert [start.l1 for start in unit.starts] == pytest.approx([0.5, 0.9])
    third = part(row(0, 1, 3, 0.5), row(2, 0, 3, 0.9))
    assert not method.more_units([first, second, third], classifier, Context())


def test_a_pair_that_is_odd_for_its_classes_stays_as_well(triple):
    classifier, _, _ = triple(None)
    # Class 1 is easy to reach from everywhere; from 4 to 3 is easier than what leads from 4 or to 3 otherwise.
    rows = []
    for source in range(5):
        for label in range(5):
            if source != label:
                loss = 0.1 if label == 1 else 3.0
                rows.append(row(source, label, 1, 3.0, loss=1.0 if (source, label) == (4, 3) else loss))
    (unit,) = SourcePairs(stay=(4, 2)).more_units([part(*rows)], classifier, Context())
    pairs = list(zip(unit.sources, unit.labels, strict=True))
    assert (4, 3) in pairs
    assert 1 in unit.labels


def judged(**more):
    figures = {"success": 1.0, "transfer": 0.0, "retention": 1.0, "second": 1.0, "area": 0.01} | more
    return SourcePairs().judge([part(row(0, 1, 3, 0.04, **figures), row(1, 2, 3, 3.0, **{**figures, "area": 0.75}))])


def test_a_smaller_trigger_that_a_new_head_does_not_know_is_more_suspicious():
    p_values = [judged(area=area).p_value for area in (0.5, 0.1, 0.01, 0.001)]
    assert p_values == sorted(p_values, reverse=True)
    for worse in ({"transfer": 1.0}, {"second": 0.5}, {"retention": 0.0}, {"success": 0.5}):
        assert judged(**worse).p_value > 1.5 * judged().p_value
    (first, *_) = judged().findings
    assert (first.source_label, first.target_label) == (0, 1)
    assert first.p_value == judged().p_value


@pytest.mark.parametrize("more", [{"success": 0.4}, {"succeeded": False}])
def test_a_trigger_that_does_not_work_is_not_suspicious(more):
    assert judged(**more, area=1e-6).p_value > 0.5


def test_many_classes_are_too_many(triple):
    classifier, images, _ = triple(None)
    method = SourcePairs(most_classes=4)
    _, judgement = run_detector(method, classifier, images, Context())
    assert method.units(classifier, Context()) == []
    assert judgement.p_value is None
    assert "Too many classes" in judgement.note


def test_labels_asked_for_are_targets_and_sources_are_all(triple):
    classifier, _, _ = triple(None)
    (unit,) = SourcePairs().units(classifier, Context(labels=(1, 3)))
    assert set(unit.labels) == {1, 3}
    assert set(unit.sources) == set(range(5))


def test_images_of_two_classes_allow_no_answer(triple):
    classifier, images, _ = triple(None)
    few = images.take(np.flatnonzero(images.labels < 2))
    evidence, judgement = run_detector(SourcePairs(steps=(2, 4, 8)), classifier, few, Context())
    assert sum(one.gradient_samples for one in evidence) == 0
    assert judgement.p_value is None


def test_pairs_from_classes_without_images_are_left_out(triple):
    classifier, images, _ = triple(None)
    some = images.take(np.flatnonzero(images.labels != 4))
    evidence, judgement = run_detector(SourcePairs(steps=(2, 4, 8)), classifier, some, Context())
    assert 4 not in {r["source"] for one in evidence for r in one.figures["labels"]}
    assert 4 in {r["label"] for one in evidence for r in one.figures["labels"]}
    assert judgement.p_value is not None


def test_it_needs_images(triple):
    classifier, _, _ = triple(None)
    with pytest.raises(MethodError, match="needs images"):
        SourcePairs().examine(Unit("x", (1,), 1, (0,)), classifier, None, Context())
