"""For authors of plugins: networks whose truth is known, and checks of the contract.

    from backdoorscan.plugin.testing import check_detector, planted

    def test_contract():
        check_detector(MyDetector)

    def test_finds_the_backdoor():
        classifier, images, trigger = planted(target=3)

docs/plugins.md has an example of each kind. ``planted`` and ``planted_pairs`` (``backdoorscan.plugin.planting``)
compute their weights in closed form, so nothing is trained and the result is the same everywhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Examined, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import attack_success_rate
from backdoorscan.plugin.contract import ContractError, is_kebab, require
from backdoorscan.plugin.detector import Detector, run_detector
from backdoorscan.plugin.method import Context, Method
from backdoorscan.plugin.planting import planted, planted_images, planted_network, planted_pairs, planted_trigger
from backdoorscan.plugin.rendering import check_reporter, sample_reports
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.trigger import Trigger

__all__ = [
    "ContractError",
    "check_detector",
    "check_repairer",
    "check_reporter",
    "planted",
    "planted_images",
    "planted_network",
    "planted_pairs",
    "planted_trigger",
    "run_detector",
    "sample_reports",
    "success_rate",
]

_MOST_UNITS = 10_000  # of five classes, in all rounds

_T = TypeVar("_T")


def check_detector(
    component: type[Detector], settings: Mapping[str, Any] | None = None, after: Sequence[type[Detector]] = ()
) -> None:
    """Check everything the contract of a detector says; not whether it finds anything.

    Args:
        component: The method.
        settings: Options for a quick run, as ``configured`` takes them.
        after: Detectors that run before it, in this order: what ``context.earlier`` holds.

    Raises:
        ContractError: What is wrong, and how to mend it.
    """
    _check_method(component, Detector)
    detector = component.configured(settings or {})
    for target in (None, 2):
        classifier, images, _ = planted(target, classes=5, blocks=3, count=60)
        whole, restricted = (
            _after(after, classifier, images, Context(seed=1, labels=labels)) for labels in (None, (1, 3))
        )
        _check_plan(detector, classifier, whole, restricted)
        _check_detector_on(detector, classifier, images, whole)


def _after(
    detectors: Sequence[type[Detector]], classifier: Classifier, images: LabelledImages, context: Context
) -> Context:
    """The context of a detector that runs after others."""
    for component in detectors:
        evidence, judgement = run_detector(component(), classifier, images, context)
        examined = Examined(evidence=evidence, judgement=judgement)
        context = replace(context, earlier={**context.earlier, component.id: examined})
    return context


def _check_detector_on(detector: Detector, classifier: Classifier, images: LabelledImages, context: Context) -> None:
    units = list(detector.units(classifier, context))
    if not detector.needs_images:
        _examine(detector, units[0], classifier, None, context)
    evidence: list[Evidence] = []
    ids: list[str] = []
    while units:
        evidence += _check_round(detector, units, classifier, images, context)
        ids += [unit.id for unit in units]
        require(len(set(ids)) == len(ids), "two units have the same id", "Seeds are derived from the id.")
        require(len(ids) < _MOST_UNITS, "more_units() does not come to an end", "Return none at the end.")
        units = list(detector.more_units(evidence, classifier, context))
        _check_units(units, detector.more_units(evidence, classifier, context), "more_units()")
    judgement = detector.judge(evidence)
    _check_judgement(judgement, classifier)
    stored = [replace(part, figures=json.loads(json.dumps(part.figures))) for part in evidence]
    for again, what in ((evidence, "a second time"), (stored, "on evidence that went through JSON")):
        same = _as_plain(detector.judge(again)) == _as_plain(judgement)
        require(same, f"judge() says something else {what}", "It must be a pure function of the evidence.")


def _check_round(
    detector: Detector, units: Sequence[Unit], classifier: Classifier, images: LabelledImages, context: Context
) -> list[Evidence]:
    with _untouched(classifier, images):
        first = [_examine(detector, unit, classifier, images, context) for unit in units]
        again = [_examine(detector, unit, classifier, images, context) for unit in reversed(units)][::-1]
    for unit, one, other in zip(units, first, again, strict=True):
        _check_evidence(unit, one, classifier)
        same = one.figures == other.figures and one.gradient_samples == other.gradient_samples
        same = same and _equal_triggers(one.triggers, other.triggers)
        what = f"examine({unit.id}) gives another result in a second run or in another order of units"
        require(same, what, "Draw random numbers only from context.generator(self.id, unit.id), and keep no state.")
    return first


def check_repairer(component: type[Repairer], settings: Mapping[str, Any] | None = None) -> None:
    """Check everything the contract of a repairer says; not whether it repairs anything.

    Args:
        component: The method.
        settings: Options for a quick run, as ``configured`` takes them.

    Raises:
        ContractError: What is wrong, and how to mend it.
    """
    _check_method(component, Repairer)
    repairer = component.configured(settings or {})
    classifier, images, trigger = planted(2, classes=5, blocks=3, count=60)
    finding = Finding(target_label=2, p_value=0.001, score=3.0, trigger=trigger, attack_success_rate=1.0, detector="x")
    for findings in ([], [finding]):
        try:
            with _untouched(classifier, images), _watched(Context(seed=1)) as watched:
                first = repairer.repair(classifier, images, findings, watched)
                again = repairer.repair(classifier, images, findings, watched)
        except MethodError:
            if findings:
                raise
            continue  # without a finding a method may refuse
        _check_candidates(first, classifier, images)
        same = [c.name for c in first] == [c.name for c in again] and all(
            _equal_weights(_weights(one.classifier), _weights(other.classifier))
            for one, other in zip(first, again, strict=True)
        )
        require(same, "repair() gives another network in a second run", "Draw only from context.generator(self.id).")


def success_rate(classifier: Classifier, images: LabelledImages, trigger: Trigger) -> float:
    """The share, 0 to 1, of the images of other classes that the trigger sends to its target; 0 without any."""
    predicted = logits(classifier, trigger.stamp(to_tensor(images.pixels))).argmax(1)
    return attack_success_rate(predicted, torch.from_numpy(images.labels), trigger.target) or 0.0


def _check_method(component: type[Method], kind: type[Method]) -> None:
    name = component.__name__
    require(issubclass(component, kind), f"{name} is no {kind.__name__}", f"Derive it from {kind.__name__}.")
    parameters = component.__dict__.get("__dataclass_params__")
    hint = "Put @dataclass(frozen=True, kw_only=True) above the class."
    require(parameters is not None and parameters.frozen, f"{name} is not a frozen dataclass", hint)
    identifier = getattr(component, "id", "")
    require(
        is_kebab(identifier),
        f"{name}.id = {identifier!r} is not in kebab-case",
        'Users type it: id = "neural-cleanse".',
    )
    # dataclass() writes a docstring of its own, "Name(field: type = default)", where there is none.
    own = (component.__dict__.get("__doc__") or "").strip()
    require(own != "" and not own.startswith(f"{name}("), f"{name} has no docstring", "Say in one line what it does.")
    for spec in component.options():
        for written in (spec.default, _as_typed(spec.default)):
            what = f"{name}.{spec.name}: the default {spec.default!r}, given as {written!r}, is read as something else"
            same = spec.parse(written, identifier) == spec.default
            require(same, what, "Make the default a value of the annotated type.")
        require(spec.help.strip() != "", f"{name}.{spec.name} has no help", "Give option(..., help=...).")
    instance = component.configured({})
    same = component.configured(instance.settings()) == instance
    require(same, f"{name}.configured(settings()) is another {name}", "Let options be the only state.")


def _as_typed(value: object) -> str:
    """A value as a user writes it after ``-O method.name=``."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _check_plan(detector: Detector, classifier: Classifier, whole: Context, restricted: Context) -> None:
    """The first round's units, of all labels and of some; and that a detector which plans none has no answer."""
    units = detector.units(classifier, whole)
    require(bool(units), "units() is empty", "Return at least one unit of work, or name what it needs in `after`.")
    _check_units(units, detector.units(classifier, whole), "units()")
    some = detector.units(classifier, restricted)
    asked, named = set(restricted.labels or ()), {label for unit in some for label in unit.labels}
    require(named <= asked, f"units() ignores context.labels: asked for 1 and 3, got {named}", "Use them.")
    if not some or not detector.units(classifier, replace(whole, earlier={})):
        judgement = detector.judge([])
        _check_judgement(judgement, classifier)
        require(judgement.p_value is None, "judge() has an answer without evidence", "Return p_value=None.")


def _check_units(units: Sequence[Unit], again: Sequence[Unit], method: str) -> None:
    unique = len({unit.id for unit in units}) == len(units)
    require(unique, "two units have the same id", "Seeds are derived from the id.")
    same = len(units) == len(again) and all(
        replace(one, starts=()) == replace(other, starts=()) and _equal_triggers(one.starts, other.starts)
        for one, other in zip(units, again, strict=True)
    )
    require(same, f"{method} differs from call to call", "Make it deterministic.")
    for unit in units:
        fit = {len(unit.sources), len(unit.starts)} <= {0, len(unit.labels)}
        require(fit, f"{unit.id} has not one source or start per label", "Give one for each label, or none.")


def _check_evidence(unit: Unit, evidence: Evidence, classifier: Classifier) -> None:
    require(isinstance(evidence, Evidence), f"examine({unit.id}) returned {evidence!r}", "Return Evidence.")
    _check_plain(evidence.figures, f"the figures of {unit.id}")
    require(evidence.gradient_samples >= 0, "gradient_samples is negative", "Count images run forward and backward.")
    channels, height, width = classifier.input_shape
    for trigger in evidence.triggers:
        shapes = tuple(trigger.mask.shape), tuple(trigger.pattern.shape)
        right = shapes == ((1, height, width), (channels, height, width))
        require(right, f"a trigger of {unit.id} has shapes {shapes}", "A mask is (1, H, W), a pattern (C, H, W).")
        values = torch.cat([trigger.mask.flatten(), trigger.pattern.flatten()])
        inside = bool(((values >= 0) & (values <= 1)).all())
        require(inside, f"a trigger of {unit.id} leaves [0, 1]", "Triggers are in pixel space.")
        # -1: no one class, as the trigger of an all-to-all backdoor.
        known = -1 <= trigger.target < classifier.num_classes
        require(known, f"a trigger leads to {trigger.target}", "Name a class, or -1 where it leads to several.")


def _check_judgement(judgement: Judgement, classifier: Classifier) -> None:
    require(isinstance(judgement, Judgement), f"judge() returned {judgement!r}", "Return a Judgement.")
    values = [finding.p_value for finding in judgement.findings]
    for p_value in [*values, judgement.p_value]:
        require(p_value is None or 0 <= p_value <= 1, f"a p-value is {p_value}", "It is a probability.")
    require(values == sorted(values), f"findings come with p-values {values}", "Put the most suspicious one first.")
    first = values[0] if values else judgement.p_value
    require(judgement.p_value == first, f"p_value is {judgement.p_value}, the first finding's {first}", "Be at one.")
    explained = judgement.p_value is not None or judgement.note != ""
    require(explained, "there is neither an answer nor a note", "Say in the note why there is none.")
    ranking, classes = list(judgement.ranking), range(classifier.num_classes)
    once = len(set(ranking)) == len(ranking) and all(label in classes for label in ranking)
    require(once, f"the ranking is {ranking}", "Name each class once at most.")
    require("\n" not in judgement.note, "the note has several lines", "One line.")
    _check_plain(judgement.figures, "the judgement's figures")
    for finding in judgement.findings:
        _check_plain(finding.to_json(), "a finding")


def _check_candidates(candidates: Sequence[Candidate], classifier: Classifier, images: LabelledImages) -> None:
    names = [candidate.name for candidate in candidates]
    require(bool(names), "repair() returned no candidate", "Return at least one, or raise MethodError.")
    require(len(set(names)) == len(names), f"candidates share names: {names}", "Files are named after them.")
    shapes = {key: tensor.shape for key, tensor in classifier.state_dict().items()}
    memory = {tensor.data_ptr() for tensor in classifier.state_dict().values()}
    for candidate in candidates:
        name, repaired, facts = candidate.name, candidate.classifier, candidate.facts
        fit = re.fullmatch(r"[\w.=+-]+", name) is not None
        require(fit, f"candidate {name!r} cannot name a file", "Use letters, digits, '=' and '-'.")
        tensors = repaired.state_dict()
        shared = [key for key, tensor in tensors.items() if tensor.data_ptr() in memory]
        require(not shared, f"{name} shares {shared} with the original", "Work on classifier.clone().")
        same = candidate.rejects or {key: tensor.shape for key, tensor in tensors.items()} == shapes
        require(same, f"{name} has other tensors than the original", "Change values only: the user's file has to fit.")
        require(not repaired.network.training, f"{name} is in training mode", "Call eval() at the end.")
        scores = logits(repaired, to_tensor(images.pixels))
        wanted = (len(images), classifier.num_classes + candidate.rejects)
        usable = scores.shape == wanted and bool(scores.isfinite().all())
        require(usable, f"{name} does not return finite logits (N, K)", "Check the repaired network.")
        _check_plain(facts, f"the facts of {name}")


def _examine(
    detector: Detector, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context
) -> Evidence:
    with _watched(context) as watched:
        return detector.examine(unit, classifier, images, watched)


@contextlib.contextmanager
def _watched(context: Context) -> Iterator[Context]:
    """A context that notes what is reported; afterwards, that nothing was printed and progress was a fraction."""
    told: list[float] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield replace(context, progress=told.append)
    require(not printed.getvalue(), f"the method prints {printed.getvalue()[:40]!r}", "Put it into the figures.")
    require(all(0 <= part <= 1 for part in told), f"progress is told {told}", "It takes the part done, 0 to 1.")


@contextlib.contextmanager
def _untouched(classifier: Classifier, images: LabelledImages) -> Iterator[None]:
    """Afterwards: weights, gradient flags, mode and images are as before."""
    next(classifier.parameters()).requires_grad_(False)  # so that "all on" and "all off" are both wrong
    before, pixels = _weights(classifier), images.pixels.copy()
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    yield
    require(_equal_weights(before, _weights(classifier)), "the classifier's weights were changed", "Use clone().")
    same = flags == [parameter.requires_grad for parameter in classifier.parameters()]
    require(same, "the parameters' requires_grad flags were changed", "Restore them in a finally clause.")
    require(not classifier.network.training, "the classifier was left in training mode", "Use clone().")
    require(np.array_equal(pixels, images.pixels), "the images were changed", "Work on a copy.")


def _plain(value: _T) -> _T:
    """``value`` after a trip through JSON."""
    return json.loads(json.dumps(value, allow_nan=False))  # type: ignore[no-any-return]


def _check_plain(value: object, what: str) -> None:
    try:
        same = _plain(value) == value
    except (TypeError, ValueError) as error:
        raise ContractError(f"{what} cannot be written as JSON: {error}. Use numbers, strings, lists.") from error
    require(same, f"{what} come back from JSON changed", "Use lists for tuples and strings for keys.")


def _as_plain(judgement: Judgement) -> object:
    findings = [finding.to_json() for finding in judgement.findings]
    return _plain([findings, judgement.p_value, list(judgement.ranking), dict(judgement.figures), judgement.note])


def _weights(classifier: Classifier) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in classifier.state_dict().items()}


def _equal_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _equal_triggers(one: Sequence[Trigger], other: Sequence[Trigger]) -> bool:
    return len(one) == len(other) and all(
        a.target == b.target and torch.equal(a.mask, b.mask) and torch.equal(a.pattern, b.pattern)
        for a, b in zip(one, other, strict=True)
    )
