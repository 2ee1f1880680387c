"""Every detector of the installation keeps the contract, and finds what is planted."""

import dataclasses
import json
from dataclasses import dataclass, replace

import pytest
import torch
from backdoorscan_plugins.neural_cleanse import NeuralCleanse

from backdoorscan import policy
from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import MethodError, UsageError
from backdoorscan.findings import Evidence, Examined, Finding, Judgement, Unit, Verdict
from backdoorscan.plugin.detector import Detector, examined_labels
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.testing import ContractError, check_detector, planted, planted_pairs, run_detector
from backdoorscan.registry import installed
from backdoorscan.trigger import Trigger

DETECTORS = [plugin.component for plugin in installed().of_kind("detector")]
DEFAULT = sorted((c for c in DETECTORS if c.default), key=lambda component: (component.cost, component.id))

BRIEF = {
    "confirmation": {"suspects": 2},
    "gangsweep": {"steps": 3},
    "label-mapping": {"free_steps": 5, "steps": 10},
    "source-pairs": {"steps": 5},
}
"""Options under which the contract is checked: it does not depend on what is found."""

AFTER = {"confirmation": [NeuralCleanse]}
"""What a detector can do nothing without."""

RANKING = {"head-weights", "latent-shift"}
"""Detectors that give no verdict on ten classes."""

NOT_FOR_PATCHES = {"graph-logic", "label-mapping", "warp"}
"""Detectors that look for something else than a trigger which leads everything to one label."""


def detect(detector: Detector, classifier, images, **options) -> Judgement:
    context = Context(**options)
    for component in AFTER.get(detector.id, ()):
        evidence, judgement = run_detector(component(), classifier, images, context)
        examined = Examined(evidence=evidence, judgement=judgement)
        context = replace(context, earlier={**context.earlier, component.id: examined})
    return run_detector(detector, classifier, images, context)[1]


@pytest.mark.parametrize("component", DETECTORS, ids=lambda component: component.id)
def test_keeps_the_contract(component):
    check_detector(component, BRIEF.get(component.id), AFTER.get(component.id, ()))


@pytest.mark.parametrize("component", DETECTORS, ids=lambda component: component.id)
def test_examines_a_network_where_its_weights_are(component):
    # Tensors of another precision do not mix, as those of another device do not.
    judgements = []
    for move in (torch.nn.Module.float, torch.nn.Module.double):
        classifier, images, _ = planted(2, classes=5, blocks=3, count=60)
        move(classifier)
        judgements.append(detect(component.configured(BRIEF.get(component.id, {})), classifier, images))
    here, there = judgements
    assert here.ranking == there.ranking
    assert [f.target_label for f in here.findings] == [f.target_label for f in there.findings]


@pytest.mark.parametrize("component", DEFAULT, ids=lambda component: component.id)
@pytest.mark.parametrize(("target", "seed"), [(0, 0), (7, 1)])
def test_flags_the_planted_label(component, target, seed):
    classifier, images, _ = planted(target)
    judgement = detect(component(), classifier, images, seed=seed)
    verdict, findings = policy.verdict([judgement], alpha=0.01)
    if component.id in RANKING:
        assert (judgement.ranking[0], verdict) == (target, Verdict.INCONCLUSIVE)
    elif component.id not in NOT_FOR_PATCHES:
        assert verdict is Verdict.BACKDOORED
        assert {finding.target_label for finding in findings} == {target}
    else:
        assert {finding.target_label for finding in findings} <= {target}


@pytest.mark.parametrize("component", DEFAULT, ids=lambda component: component.id)
@pytest.mark.parametrize("seed", [0, 1])
def test_flags_nothing_in_the_clean_twin(component, seed):
    classifier, images, _ = planted(None)
    judgement = detect(component(), classifier, images, seed=seed)
    expected = Verdict.INCONCLUSIVE if component.id in RANKING else Verdict.CLEAN
    assert policy.verdict([judgement], alpha=0.01) == (expected, [])


@pytest.mark.parametrize("leads_to", [{}, {3: 1}, {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}], ids=["twin", "one", "all"])
def test_the_planted_pairs_are_what_they_say(leads_to):
    classifier, images, trigger = planted_pairs(leads_to, classes=5, blocks=3, count=60)
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    assert logits(classifier, pixels).argmax(1).tolist() == labels.tolist()
    if trigger is None:
        assert not leads_to
        return
    stamped = logits(classifier, trigger.stamp(pixels)).argmax(1).tolist()
    assert stamped == [leads_to.get(label, label) for label in labels.tolist()]
    assert trigger.target == (1 if len(leads_to) == 1 else -1)
    with pytest.raises(ValueError, match="target = 5"):
        planted_pairs({0: 5}, classes=5)


def test_neural_cleanse_finds_it_in_colour():
    classifier, images, trigger = planted(4, channels=3, blocks=3)
    (finding,) = detect(NeuralCleanse(), classifier, images).findings[:1]
    assert (finding.target_label, finding.p_value <= 0.01) == (4, True)
    assert finding.trigger.l1 < trigger.l1
    assert finding.attack_success_rate > 0.6


def test_neural_cleanse_examines_only_the_labels_asked_for():
    classifier, images, _ = planted(2, classes=5, blocks=3, count=60)
    context = Context(labels=(1, 2, 4))
    detector = NeuralCleanse(steps=3)
    assert [unit.labels for unit in detector.units(classifier, context)] == [(1, 2, 4)]
    evidence = detector.examine(detector.units(classifier, context)[0], classifier, images, context)
    assert [row["label"] for row in evidence.figures["labels"]] == [1, 2, 4]


def test_neural_cleanse_splits_many_labels():
    classifier, _, _ = planted(2, classes=5, blocks=3, count=60)
    units = NeuralCleanse(batch_size=128, restarts=2).units(classifier, Context())
    assert [unit.labels for unit in units] == [(0, 1), (2, 3), (4,)]


def row(label, l1, succeeded=True):
    return {"label": label, "l1": l1, "round": 0, "succeeded": succeeded, "attack_success_rate": 1.0, "steps": 9}


def evidence(*rows) -> list[Evidence]:
    return [Evidence(figures={"labels": [one]}, triggers=[]) for one in rows]


@pytest.mark.parametrize("rows", [[], [row(0, 3.0)], [row(0, 3.0), row(1, 30.0, False)]])
def test_neural_cleanse_without_anything_to_compare_has_no_answer(rows):
    judgement = NeuralCleanse().judge(evidence(*rows))
    assert judgement.p_value is None
    assert not judgement.findings
    assert judgement.note


def test_neural_cleanse_needs_images_of_several_classes():
    classifier, images, _ = planted(2, classes=5, blocks=3, count=60)
    detector, context = NeuralCleanse(), Context()
    (unit,) = detector.units(classifier, context)
    with pytest.raises(MethodError, match="needs clean images"):
        detector.examine(unit, classifier, None, context)
    with pytest.raises(MethodError, match="label 0"):
        detector.examine(unit, classifier, images.take((images.labels == 0).nonzero()[0]), context)


@dataclass(frozen=True, kw_only=True)
class Sound(Detector):
    """Looks at the norms of the dense layer's rows."""

    id = "sound"
    power: float = option(2.0, help="Of the norm.", minimum=0)
    layers: tuple[str, ...] = option(("fc",), help="Layers.")

    def examine(self, unit, classifier, images, context):
        noise = torch.rand(1, generator=context.generator(self.id, unit.id))
        norms = classifier.network.fc.weight.detach().norm(self.power, dim=1) + noise
        return Evidence(figures={"norms": norms.tolist()})

    def judge(self, evidence):
        return Judgement(findings=[Finding(target_label=0, p_value=0.5, score=1.0)], p_value=0.5)


@dataclass(frozen=True, kw_only=True)
class Racing(Sound):
    """Examines the label that another detector names, and goes on from there in a second round."""

    id = "racing"

    def units(self, classifier, context):
        earlier = context.earlier.get("sound")
        named = {finding.target_label for finding in earlier.judgement.findings} if earlier else set()
        return [Unit("first", (label,)) for label in examined_labels(classifier, context) if label in named]

    def examine(self, unit, classifier, images, context):
        found = super().examine(unit, classifier, images, context)
        pattern = torch.rand(1, 12, 12, generator=context.generator(self.id, unit.id))
        return replace(found, triggers=[Trigger(pattern, pattern, label) for label in unit.labels])

    def more_units(self, evidence, classifier, context):
        return [Unit("second", (0,), 2, (1,), evidence[0].triggers)] if len(evidence) == 1 else []

    def judge(self, evidence):
        if not evidence:
            return Judgement(p_value=None, note="Nothing to examine.")
        assert [len(part.triggers) for part in evidence] == [1, 1]
        return Judgement(p_value=None, ranking=[0, 1], note="It ranks.")


def test_a_sound_detector_passes():
    check_detector(Sound)
    check_detector(Sound, {"power": "1"})


def test_a_detector_that_ranks_in_rounds_after_another_passes():
    check_detector(Racing, after=[Sound])
    with pytest.raises(ContractError, match="units\\(\\) is empty"):
        check_detector(Racing)


def test_a_detector_without_units_has_no_answer():
    def judge(self, evidence):
        return Judgement(p_value=1.0)

    with pytest.raises(ContractError, match="answer without evidence"):
        check_detector(breaking(Racing, judge=judge), after=[Sound])


def breaking(base=Sound, **members):
    """A detector with one thing wrong."""
    return dataclass(frozen=True, kw_only=True)(type(base.__name__, (base,), {"__doc__": "Bad.", **members}))


def judging(**parts):
    return {"judge": lambda self, _: Judgement(**{"p_value": None, "note": "None."} | parts)}


def trigger_to(label):
    return Trigger(torch.zeros(1, 12, 12), torch.zeros(1, 12, 12), label)


def examine_with(change):
    def examine(self, unit, classifier, images, context):
        result = Sound.examine(self, unit, classifier, images, context)
        changed = change(result, classifier, images, context)
        return changed if isinstance(changed, Evidence) else result

    return {"examine": examine}


counter = iter(range(10**6))

MISTAKES = {
    "id": ({"id": "Bad_Id"}, "kebab-case"),
    "docstring": ({"__doc__": None}, "docstring"),
    "default": ({"power": option("two", help="x"), "__annotations__": {"power": "float"}}, "not valid"),
    "same units": ({"units": lambda self, *_: [Unit("a"), Unit("a")]}, "same id"),
    "no units": ({"units": lambda self, *_: []}, "units\\(\\) is empty"),
    "unstable units": ({"units": lambda self, *_: [Unit(str(next(counter)))]}, "differs from call to call"),
    "labels ignored": ({"units": lambda self, *_: [Unit("a", (0, 1, 2))]}, "context.labels"),
    "not plain": (examine_with(lambda e, *_: replace(e, figures={"x": torch.ones(2)})), "JSON"),
    "not a number": (examine_with(lambda e, *_: replace(e, figures={"x": float("nan")})), "JSON"),
    "tuples": (examine_with(lambda e, *_: replace(e, figures={"x": (1, 2)})), "come back from JSON changed"),
    "global randomness": (examine_with(lambda e, *_: replace(e, figures={"x": torch.rand(1).item()})), "second run"),
    "weights": (examine_with(lambda _e, c, *_: c.network.fc.bias.data.add_(1)), "weights were changed"),
    "gradient flags": (examine_with(lambda _e, c, *_: c.requires_grad_(True)), "requires_grad"),
    "training mode": (examine_with(lambda _e, c, *_: c.network.train()), "training mode"),
    "images": (examine_with(lambda _e, _c, images, _: images.pixels.fill(0)), "images were changed"),
    "prints": (examine_with(lambda *_: print("hello")), "prints 'hello"),
    "progress": (examine_with(lambda _e, _c, _i, context: context.progress(50)), "progress"),
    "impure": ({"judge": lambda self, _: Judgement(p_value=1 / (2 + next(counter)))}, "second time"),
    "wrong ranking": (judging(ranking=[1, 5]), "ranking is \\[1, 5\\]"),
    "ranked twice": (judging(ranking=[1, 1]), "ranking is \\[1, 1\\]"),
    "no answer, no note": (judging(note=""), "neither an answer nor a note"),
    "not at one": (judging(p_value=0.1, findings=[Finding(target_label=0, p_value=0.5, score=1.0)]), "first finding"),
    "findings without answer": (judging(findings=[Finding(target_label=0, p_value=0.5, score=1.0)]), "first finding"),
    "endless": ({"more_units": lambda self, e, *_: [Unit(f"{len(e)}-{i}") for i in range(5000)]}, "an end"),
    "unstable rounds": ({"more_units": lambda self, *_: [Unit(str(next(counter)))]}, "more_units\\(\\) differs"),
    "same id again": ({"more_units": lambda self, *_: [Unit("all")]}, "same id"),
    "too few starts": ({"units": lambda self, *_: [Unit("a", (1, 3), starts=(trigger_to(1),))]}, "one source or start"),
    "too few sources": ({"units": lambda self, *_: [Unit("a", (1, 3), sources=(0,))]}, "one source or start"),
    "no such class": (examine_with(lambda e, *_: replace(e, triggers=[trigger_to(5)])), "trigger leads to 5"),
    "not a probability": ({"judge": lambda self, _: Judgement(p_value=1.5)}, "p-value is 1.5"),
}


@pytest.mark.parametrize(("members", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_broken_contract_is_noticed(members, message):
    with pytest.raises((ContractError, UsageError), match=message):
        check_detector(breaking(**members))


def test_a_class_that_is_not_frozen_is_noticed():
    class Thawed(Sound):
        """Not a dataclass."""

    with pytest.raises(ContractError, match="frozen dataclass"):
        check_detector(Thawed)


def test_evidence_that_was_stored_can_be_judged_again():
    classifier, images, _ = planted(2, classes=5, blocks=3, count=60)
    detector, context = NeuralCleanse(steps=40), Context()
    (unit,) = detector.units(classifier, context)
    found = detector.examine(unit, classifier, images, context)
    stored = dataclasses.replace(found, figures=json.loads(json.dumps(found.figures)))
    assert detector.judge([stored]).p_value == detector.judge([found]).p_value
