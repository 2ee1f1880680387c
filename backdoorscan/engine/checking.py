"""What detectors return, before anything is concluded from it: nonsense must not end as a verdict.

``plugin.testing`` holds authors to more; here are refused only answers that a verdict or a report cannot rest on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from backdoorscan.classifier import Classifier
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.plugin.detector import Detector
from backdoorscan.trigger import Trigger

_NO_LABEL = -1
"""In place of a target label where a trigger leads to several."""

_SUSPICIOUS = 0.05
"""Evidence as strong as this has to be of some label."""


class _Nonsense(Exception):
    """What is wrong with an answer."""


def sound_units(detector: Detector, units: Any) -> Sequence[Unit]:
    """The units that a detector asks for.

    Raises:
        MethodError: They are no units, or two have one name.
    """
    listed = isinstance(units, Sequence) and all(isinstance(unit, Unit) for unit in units)
    if not listed or len({unit.id for unit in units}) < len(units):
        raise _refusal(detector, "units that cannot be worked on", "A list of units is needed, each of another name.")
    return list(units)


def sound_evidence(detector: Detector, unit: Unit, evidence: Any, classifier: Classifier) -> Evidence:
    """The evidence of a unit.

    Raises:
        MethodError: It is none, is no plain data, or has triggers that do not fit the network.
    """
    try:
        _require(isinstance(evidence, Evidence), f"It is a {type(evidence).__name__}.")
        _check_plain(evidence.figures)
        samples = evidence.gradient_samples
        _require(isinstance(samples, int) and samples >= 0, f"Its gradient_samples are {samples!r}.")
        for trigger in evidence.triggers:
            _check_trigger(trigger, classifier)
    except _Nonsense as fault:
        raise _refusal(detector, f"no sound evidence on {unit.id}", str(fault)) from fault
    return evidence  # type: ignore[no-any-return]


def sound_judgement(detector: Detector, judgement: Any, classifier: Classifier) -> Judgement:
    """What a detector makes of its evidence.

    Raises:
        MethodError: It is no judgement, a p-value is no probability, a label is none of the network's, or its findings
            and its p-value say different things.
    """
    try:
        _require(isinstance(judgement, Judgement), f"It is a {type(judgement).__name__}.")
        for finding in judgement.findings:
            _check_finding(finding, classifier)
        _require(judgement.p_value is None or _is_rate(judgement.p_value), f"Its p-value is {judgement.p_value!r}.")
        least = min((finding.p_value for finding in judgement.findings), default=None)
        if least is not None:
            _require(judgement.p_value == least, f"Its p-value is {judgement.p_value}, its findings' is {least}.")
        elif judgement.p_value is not None:
            _require(judgement.p_value > _SUSPICIOUS, f"Its p-value is {judgement.p_value}, of no label.")
        _check_plain(judgement.figures)
        classes = range(classifier.num_classes if judgement.ranking else 0)
        _require(all(_is_label(label, classes) for label in judgement.ranking), "It ranks labels that there are not.")
        _require(isinstance(judgement.note, str), "Its note is no text.")
    except _Nonsense as fault:
        raise _refusal(detector, "no sound judgement", str(fault)) from fault
    return judgement  # type: ignore[no-any-return]


def _check_finding(finding: Any, classifier: Classifier) -> None:
    _require(isinstance(finding, Finding), f"One of its findings is a {type(finding).__name__}.")
    _require(_is_rate(finding.p_value), f"A finding's p-value is {finding.p_value!r}.")
    classes = range(classifier.num_classes)
    _require(_is_label(finding.target_label, [_NO_LABEL, *classes]), f"It finds the label {finding.target_label!r}.")
    source, success = finding.source_label, finding.attack_success_rate
    _require(source is None or _is_label(source, classes), f"It finds the source label {source!r}.")
    _require(_is_number(finding.score), f"A finding's score is {finding.score!r}.")
    _require(success is None or _is_rate(success), f"An attack success rate is {success!r}.")
    if finding.trigger is not None:
        _check_trigger(finding.trigger, classifier)


def _check_trigger(trigger: Any, classifier: Classifier) -> None:
    _require(isinstance(trigger, Trigger), f"One of its triggers is a {type(trigger).__name__}.")
    channels, height, width = classifier.input_shape
    for part, shape in ((trigger.mask, (1, height, width)), (trigger.pattern, (channels, height, width))):
        _require(isinstance(part, torch.Tensor), "A trigger is not made of tensors.")
        _require(tuple(part.shape) == shape, f"A trigger's shape is {tuple(part.shape)} where {shape} is needed.")
        _require(bool(((part >= 0) & (part <= 1)).all()), "A trigger has values outside 0 to 1.")
    known = [_NO_LABEL, *range(classifier.num_classes)]
    _require(_is_label(trigger.target, known), f"A trigger leads to the label {trigger.target!r}.")


def _check_plain(figures: Any) -> None:
    _require(isinstance(figures, Mapping), "Its figures have no names.")
    try:
        json.dumps(dict(figures))
    except (TypeError, ValueError, RecursionError) as error:
        raise _Nonsense(f"Its figures are no plain data: {error}.") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rate(value: Any) -> bool:
    """Whether it is a number from 0 to 1, which NaN is not."""
    return _is_number(value) and 0 <= value <= 1


def _is_label(value: object, known: Collection[int]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in known


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Nonsense(otherwise)


def _refusal(detector: Detector, what: str, why: str) -> MethodError:
    return MethodError(
        f"{detector.id} returned {what}.", why=why, hint="Please report this to the method's author, with the model."
    )
