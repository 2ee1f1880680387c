"""Suspects of Neural Cleanse are weighed again, and that verdict takes the place of the first."""

import math
import statistics

import pytest
import torch
from backdoorscan_plugins.confirmation import WEIGHTS, Confirmation, suspicion
from backdoorscan_plugins.latent import LatentShift
from backdoorscan_plugins.neural_cleanse import NeuralCleanse
from backdoorscan_plugins.perturbations import UniversalPerturbation

from backdoorscan import policy, scan
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Examined, Finding, Judgement, Unit, Verdict
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted, run_detector
from backdoorscan.scanning import ScanOptions
from backdoorscan.trigger import Trigger


def examined(classifier, images, *components, **options):
    """The context of a detector that runs after these."""
    earlier = {}
    for component in components:
        evidence, judgement = run_detector(component(), classifier, images, Context(earlier=dict(earlier), **options))
        earlier[component.id] = Examined(evidence=evidence, judgement=judgement)
    return Context(earlier=earlier, **options)


ALL = (LatentShift, NeuralCleanse, UniversalPerturbation)


def test_it_tells_a_planted_backdoor_from_the_clean_twin():
    scores = {}
    for target in (None, 4):
        classifier, images, _ = planted(target)
        context = examined(classifier, images, *ALL)
        evidence, judgement = run_detector(Confirmation(), classifier, images, context)
        assert len(evidence) == 4
        assert [part.figures["label"] for part in evidence] == list(
            context.earlier["neural-cleanse"].judgement.ranking[:4]
        )
        scores[target] = judgement.p_value
        verdict, findings = policy.verdict([judgement], 0.01)
        assert verdict is (Verdict.CLEAN if target is None else Verdict.BACKDOORED)
        assert [finding.target_label for finding in findings] == ([] if target is None else [4])
    assert scores[4] < 1e-3 * scores[None]


def test_a_trained_backdoor_is_more_suspicious_than_anything_in_a_clean_network(trained):
    scores = {}
    for attack in ("clean", "badnets", "blended"):
        net = trained(attack)
        context = examined(net.classifier, net.images, *ALL)
        _, judgement = run_detector(Confirmation(), net.classifier, net.images, context)
        scores[attack] = judgement.findings[0].score
        if attack != "clean":
            assert judgement.findings[0].target_label == net.aim.target
    assert min(scores["badnets"], scores["blended"]) > scores["clean"] + 1


def test_all_figures_are_collected_where_the_earlier_detectors_ran():
    classifier, images, _ = planted(4)
    whole, _ = run_detector(Confirmation(), classifier, images, examined(classifier, images, *ALL))
    assert set(WEIGHTS) <= set(whole[0].figures)
    few, _ = run_detector(Confirmation(), classifier, images, examined(classifier, images, NeuralCleanse))
    missing = set(WEIGHTS) - set(few[0].figures)
    assert missing == {"latent", "pattern_ratio"}


def test_what_the_comparisons_mean():
    """ln of the median of the other labels over the label's own figure."""
    classifier, images, _ = planted(4)
    context = examined(classifier, images, *ALL)
    evidence, _ = run_detector(Confirmation(suspects=1), classifier, images, context)
    (figures,) = [part.figures for part in evidence]

    def lead(detector, name):
        rows = context.earlier[detector].evidence[0].figures["labels"]
        own = {row["label"]: math.log(max(row[name], 1e-3)) for row in rows}
        return statistics.median(own[label] for label in range(10) if label != 4) - own[4]

    assert figures["label"] == 4
    assert figures["ratio"] == pytest.approx(lead("neural-cleanse", "l1"), abs=1e-4)
    assert figures["latent"] == pytest.approx(lead("latent-shift", "step"), abs=1e-4)
    assert figures["pattern_ratio"] == pytest.approx(lead("perturbation", "size"), abs=1e-4)
    assert figures["size"] == pytest.approx(math.log(evidence[0].triggers[0].area), abs=1e-4)


def test_every_figure_counts_as_its_weight_says():
    plain = {name: mean for name, (mean, _, _) in WEIGHTS.items()}
    assert suspicion({}) == suspicion(plain) == pytest.approx(0, abs=1e-9)
    for name, (mean, sd, weight) in WEIGHTS.items():
        assert suspicion({**plain, name: mean + sd}) == pytest.approx(weight)
    assert suspicion({"size": -1e9}) <= 10  # no figure decides alone without bounds


def part(label, **figures):
    plain = {name: mean for name, (mean, _, _) in WEIGHTS.items()}
    return Evidence(figures={"label": label, "success": 0.9, **plain, **figures})


def test_the_most_suspicious_label_comes_first():
    judgement = Confirmation().judge([part(3), part(1, size=-40.0), part(2)])
    first = judgement.findings[0]
    assert (first.target_label, first.p_value) == (1, judgement.p_value)
    assert first.attack_success_rate == 0.9
    assert first.score == judgement.figures["score"] > 0
    assert Confirmation().judge([part(1)]).p_value > judgement.p_value


def test_without_suspects_it_has_no_answer(triple):
    classifier, images, _ = triple(None)
    for context in (
        Context(),
        Context(earlier={"neural-cleanse": Examined(evidence=[], judgement=Judgement(p_value=None, note="x"))}),
    ):
        _, judgement = run_detector(Confirmation(), classifier, images, context)
        assert judgement.p_value is None
        assert "nothing to confirm" in judgement.note


def test_as_many_suspects_as_asked_for_those_with_the_smallest_triggers(triple):
    classifier, images, _ = triple(2)
    context = examined(classifier, images, NeuralCleanse)
    units = Confirmation(suspects=2).units(classifier, context)
    assert [unit.labels[0] for unit in units] == list(context.earlier["neural-cleanse"].judgement.ranking[:2])
    assert all(unit.starts[0].target == unit.labels[0] for unit in units)


def test_it_needs_images_of_another_class(triple):
    classifier, images, _ = triple(2)
    context = examined(classifier, images, NeuralCleanse)
    unit = Unit("label 2", (2,), starts=(Trigger(torch.zeros(1, 12, 12), torch.zeros(1, 12, 12), 2),))
    with pytest.raises(MethodError, match="needs images"):
        Confirmation().examine(unit, classifier, None, context)
    with pytest.raises(MethodError, match="cannot examine label 2"):
        Confirmation().examine(unit, classifier, images.take((images.labels == 2).nonzero()[0]), context)


class Alarmed(NeuralCleanse):
    """Reports a label that is not among the smallest triggers."""

    def judge(self, evidence):
        judgement = super().judge(evidence)
        return Judgement(
            p_value=1e-6,
            findings=[Finding(target_label=0, p_value=1e-6, score=9.0)],
            ranking=[label for label in judgement.ranking if label != 0],
        )


def test_its_answer_takes_the_place_of_the_first_verdict(model_file, registry_of):
    file = model_file(None)

    def verdict(*detectors):
        registry = registry_of(detectors=list(detectors))
        options = ScanOptions(settings={"neural-cleanse": {"steps": 60}})
        return scan(file.path, file.images, file.read, options, registry=registry)

    alone, both = verdict(Alarmed), verdict(Alarmed, Confirmation)
    assert alone.verdict is Verdict.BACKDOORED
    assert both.verdict is Verdict.CLEAN
    # The report keeps what the first one said.
    assert both.runs[0].detectors[0].p_value == 1e-6
