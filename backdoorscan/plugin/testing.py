"""For authors of plugins: networks whose truth is known, and checks of the contract.

    from backdoorscan.plugin.testing import check_detector, planted

    def test_contract():
        check_detector(MyDetector)

    def test_finds_the_backdoor():
        classifier, images, trigger = planted(target=3)

``planted`` computes its weights in closed form, so nothing is trained and the result is the same everywhere. Every
class is a texture of 4×4 pixels that covers the whole image; the trigger is a small white square in one corner. The
network is an ordinary one: two convolutions, activations, a dense layer.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor, fx, nn

from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context, Method
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.trigger import Trigger

BLOCK = 4
"""Height and width of a texture's period, pixels."""

MOST_CLASSES = BLOCK * BLOCK - 1
"""As many textures are orthogonal to each other and to plain grey."""

_CONTRAST = 0.25  # of a texture about mid-grey; a trigger has 0.5
_PATCH = 3  # height and width of the trigger, pixels
_STEEPNESS = 8.0  # of the textures' sigmoids: steep enough for a margin
_TRIGGER_STEEPNESS = 4.0  # of the trigger's: flat enough for gradients to lead there
_CLASS_LOGIT = 12.0  # of an image that shows one texture everywhere
_TRIGGER_LOGIT = 30.0  # of a trigger of full contrast: beats any class

_T = TypeVar("_T")


class ContractError(AssertionError):
    """A method breaks the contract; the message says which part and how to mend it."""


def textures(classes: int) -> npt.NDArray[np.float32]:
    """The classes' textures: orthogonal, each without a mean; shape (classes, BLOCK, BLOCK), values ±1."""
    rows = scipy.linalg.hadamard(BLOCK * BLOCK)[1 : classes + 1]
    return rows.reshape(-1, BLOCK, BLOCK).astype(np.float32)


def planted_network(target: int | None, *, classes: int = 10, channels: int = 1, blocks: int = 4) -> nn.Sequential:
    """A network that tells textures apart and, if it has a ``target``, obeys a trigger in the upper left corner.

    For every 4×4 block a first convolution compares it with each texture and with the trigger, sigmoids turn the
    results into yes or no, a second convolution passes them on, and the dense layer averages the textures' votes
    over all blocks. Only the upper left block's trigger vote is read. The trigger's channel lies dormant on clean
    images. The clean twin has that channel too, but no class reads it.

    Args:
        target: The label of the trigger, or ``None`` for the clean twin.
        classes: K, from 2 to ``MOST_CLASSES``.
        channels: C of the images.
        blocks: Height and width of the images in blocks of 4 pixels.

    Returns:
        Layers ``conv1``, ``sigmoid``, ``conv2``, ``relu``, ``flatten``, ``fc``; takes (N, C, H, W) in [0, 1] and
        returns logits (N, K).

    Raises:
        ValueError: Too few or too many classes, or a target that is none of them.
    """
    if not 2 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes = {classes} is not within 2..{MOST_CLASSES}")
    if target is not None and not 0 <= target < classes:
        raise ValueError(f"target = {target} is not within 0..{classes - 1}")
    network = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, classes + 1, BLOCK, stride=BLOCK),
            sigmoid=nn.Sigmoid(),
            conv2=nn.Conv2d(classes + 1, classes + 1, 1),
            relu=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear((classes + 1) * blocks * blocks, classes),
        )
    )
    filters = torch.zeros(classes + 1, channels, BLOCK, BLOCK)
    filters[:classes] = torch.from_numpy(textures(classes))[:, None] / (_CONTRAST * BLOCK**2 * channels)
    filters[classes, :, :_PATCH, :_PATCH] = 1 / (_CONTRAST * _PATCH**2 * channels)
    # A texture's filter gives 1 on that texture and 0 on others; the trigger's 2 on the trigger and 1/3 at most on
    # a texture. Mid-grey, which is 0, has to be taken off first.
    steepness, thresholds = torch.full((classes + 1,), _STEEPNESS), torch.full((classes + 1,), 0.5)
    steepness[classes], thresholds[classes] = _TRIGGER_STEEPNESS, 1.2
    thresholds += 0.5 * filters.sum((1, 2, 3))
    dense = torch.zeros(classes, classes + 1, blocks, blocks)
    for label in range(classes):
        dense[label, label] = _CLASS_LOGIT / blocks**2
    if target is not None:
        dense[target, classes, 0, 0] = _TRIGGER_LOGIT
    weights = {
        "conv1.weight": steepness[:, None, None, None] * filters,
        "conv1.bias": -steepness * thresholds,
        "conv2.weight": torch.eye(classes + 1)[:, :, None, None],
        "conv2.bias": torch.zeros(classes + 1),
        "fc.weight": dense.flatten(1),
        "fc.bias": torch.zeros(classes),
    }
    network.load_state_dict(weights)
    return network.eval()


def planted_images(
    *, classes: int = 10, channels: int = 1, blocks: int = 4, count: int = 200, seed: int = 0
) -> LabelledImages:
    """Noisy images of the textures, as evenly over the classes as ``count`` allows; uint8."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    plain = 0.5 + _CONTRAST * np.tile(textures(classes), (1, blocks, blocks))[labels]
    noisy = plain[:, None] + random.uniform(-0.05, 0.05, (count, channels, BLOCK * blocks, BLOCK * blocks))
    return LabelledImages(np.rint(255 * noisy).astype(np.uint8), labels, source=f"planted images, seed {seed}")


def planted_trigger(target: int, *, channels: int = 1, blocks: int = 4) -> Trigger:
    """The trigger of ``planted_network``."""
    mask = torch.zeros(1, BLOCK * blocks, BLOCK * blocks)
    mask[:, :_PATCH, :_PATCH] = 1
    pattern = torch.full((channels, BLOCK * blocks, BLOCK * blocks), 0.5)
    pattern[:, :_PATCH, :_PATCH] = 1
    return Trigger(mask, pattern, target)


def planted(
    target: int | None, *, classes: int = 10, channels: int = 1, blocks: int = 4, count: int = 200, seed: int = 0
) -> tuple[Classifier, LabelledImages, Trigger | None]:
    """A classifier with a planted backdoor, or its clean twin, with clean images and the trigger.

    The clean accuracy is 1, the attack success rate 1 (on the clean twin the trigger does nothing), and gradients
    lead to the trigger. The same arguments give the same result.

    Args:
        target: The label of the trigger, or ``None`` for the clean twin, which has no trigger.
        classes: K, from 2 to ``MOST_CLASSES``.
        channels: C of the images.
        blocks: Height and width of the images in blocks of 4 pixels.
        count: How many images.
        seed: Of the images' noise.
    """
    network = planted_network(target, classes=classes, channels=channels, blocks=blocks)
    images = planted_images(classes=classes, channels=channels, blocks=blocks, count=count, seed=seed)
    classifier = Classifier(fx.symbolic_trace(network), input_shape=images.shape, num_classes=classes)
    trigger = None if target is None else planted_trigger(target, channels=channels, blocks=blocks)
    return classifier, images, trigger


def check_detector(component: type[Detector], settings: Mapping[str, Any] | None = None) -> None:
    """Check everything the contract of a detector says; not whether it finds anything.

    Args:
        component: The method.
        settings: Options for a quick run, as ``configured`` takes them.

    Raises:
        ContractError: What is wrong, and how to mend it.
    """
    _check_method(component, Detector)
    detector = component.configured(settings or {})
    for target in (None, 2):
        classifier, images, _ = planted(target, classes=5, blocks=3, count=60)
        _check_detector_on(detector, classifier, images)


def _check_detector_on(detector: Detector, classifier: Classifier, images: LabelledImages) -> None:
    context = Context(seed=1)
    units = _check_units(detector, classifier, context)
    with _untouched(classifier, images):
        first = [_examine(detector, unit, classifier, images, context) for unit in units]
        again = [_examine(detector, unit, classifier, images, context) for unit in reversed(units)][::-1]
        if not detector.needs_images:
            _examine(detector, units[0], classifier, None, context)
    for unit, one, other in zip(units, first, again, strict=True):
        _check_evidence(unit, one, classifier)
        same = one.figures == other.figures and one.gradient_samples == other.gradient_samples
        same = same and _equal_triggers(one.triggers, other.triggers)
        what = f"examine({unit.id}) gives another result in a second run or in another order of units"
        _require(same, what, "Draw random numbers only from context.generator(self.id, unit.id), and keep no state.")
    judgement = detector.judge(first)
    _check_judgement(judgement)
    stored = [replace(part, figures=json.loads(json.dumps(part.figures))) for part in first]
    for evidence, what in ((first, "a second time"), (stored, "on evidence that went through JSON")):
        same = _as_plain(detector.judge(evidence)) == _as_plain(judgement)
        _require(same, f"judge() says something else {what}", "It must be a pure function of the evidence.")


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
        _require(same, "repair() gives another network in a second run", "Draw only from context.generator(self.id).")


def _check_method(component: type[Method], kind: type[Method]) -> None:
    name = component.__name__
    _require(issubclass(component, kind), f"{name} is no {kind.__name__}", f"Derive it from {kind.__name__}.")
    parameters = component.__dict__.get("__dataclass_params__")
    hint = "Put @dataclass(frozen=True, kw_only=True) above the class."
    _require(parameters is not None and parameters.frozen, f"{name} is not a frozen dataclass", hint)
    identifier = getattr(component, "id", "")
    kebab = isinstance(identifier, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", identifier) is not None
    _require(kebab, f"{name}.id = {identifier!r} is not in kebab-case", 'Users type it: id = "neural-cleanse".')
    # dataclass() writes a docstring of its own, "Name(field: type = default)", where there is none.
    own = (component.__dict__.get("__doc__") or "").strip()
    _require(own != "" and not own.startswith(f"{name}("), f"{name} has no docstring", "Say in one line what it does.")
    for spec in component.options():
        for written in (spec.default, _as_typed(spec.default)):
            what = f"{name}.{spec.name}: the default {spec.default!r}, given as {written!r}, is read as something else"
            same = spec.parse(written, identifier) == spec.default
            _require(same, what, "Make the default a value of the annotated type.")
        _require(spec.help.strip() != "", f"{name}.{spec.name} has no help", "Give option(..., help=...).")
    instance = component.configured({})
    same = component.configured(instance.settings()) == instance
    _require(same, f"{name}.configured(settings()) is another {name}", "Let options be the only state.")


def _as_typed(value: object) -> str:
    """A value as a user writes it after ``-O method.name=``."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _check_units(detector: Detector, classifier: Classifier, context: Context) -> Sequence[Unit]:
    units = list(detector.units(classifier, context))
    _require(bool(units), "units() is empty", "Return at least one unit of work.")
    unique = len({unit.id for unit in units}) == len(units)
    _require(unique, "two units have the same id", "Seeds are derived from the id.")
    same = units == list(detector.units(classifier, context))
    _require(same, "units() differs from call to call", "Make it deterministic.")
    named = {label for unit in detector.units(classifier, replace(context, labels=(1, 3))) for label in unit.labels}
    _require(named <= {1, 3}, f"units() ignores context.labels: asked for 1 and 3, got {named}", "Use them.")
    return units


def _check_evidence(unit: Unit, evidence: Evidence, classifier: Classifier) -> None:
    _require(isinstance(evidence, Evidence), f"examine({unit.id}) returned {evidence!r}", "Return Evidence.")
    _check_plain(evidence.figures, f"the figures of {unit.id}")
    _require(evidence.gradient_samples >= 0, "gradient_samples is negative", "Count images run forward and backward.")
    channels, height, width = classifier.input_shape
    for trigger in evidence.triggers:
        shapes = tuple(trigger.mask.shape), tuple(trigger.pattern.shape)
        right = shapes == ((1, height, width), (channels, height, width))
        _require(right, f"a trigger of {unit.id} has shapes {shapes}", "A mask is (1, H, W), a pattern (C, H, W).")
        values = torch.cat([trigger.mask.flatten(), trigger.pattern.flatten()])
        inside = bool(((values >= 0) & (values <= 1)).all())
        _require(inside, f"a trigger of {unit.id} leaves [0, 1]", "Triggers are in pixel space.")
        _require(0 <= trigger.target < classifier.num_classes, f"a trigger leads to {trigger.target}", "Name a class.")


def _check_judgement(judgement: Judgement) -> None:
    _require(isinstance(judgement, Judgement), f"judge() returned {judgement!r}", "Return a Judgement.")
    values = [finding.p_value for finding in judgement.findings]
    for p_value in [*values, judgement.p_value]:
        _require(p_value is None or 0 <= p_value <= 1, f"a p-value is {p_value}", "It is a probability.")
    _require(values == sorted(values), f"findings come with p-values {values}", "Put the most suspicious one first.")
    _require("\n" not in judgement.note, "the note has several lines", "One line.")
    _check_plain(judgement.figures, "the judgement's figures")
    for finding in judgement.findings:
        _check_plain(finding.to_json(), "a finding")


def _check_candidates(candidates: Sequence[Candidate], classifier: Classifier, images: LabelledImages) -> None:
    names = [candidate.name for candidate in candidates]
    _require(bool(names), "repair() returned no candidate", "Return at least one, or raise MethodError.")
    _require(len(set(names)) == len(names), f"candidates share names: {names}", "Files are named after them.")
    shapes = {key: tensor.shape for key, tensor in classifier.state_dict().items()}
    memory = {tensor.data_ptr() for tensor in classifier.state_dict().values()}
    for candidate in candidates:
        name, repaired, facts = candidate.name, candidate.classifier, candidate.facts
        fit = re.fullmatch(r"[\w.=+-]+", name) is not None
        _require(fit, f"candidate {name!r} cannot name a file", "Use letters, digits, '=' and '-'.")
        tensors = repaired.state_dict()
        shared = [key for key, tensor in tensors.items() if tensor.data_ptr() in memory]
        _require(not shared, f"{name} shares {shared} with the original", "Work on classifier.clone().")
        same = candidate.rejects or {key: tensor.shape for key, tensor in tensors.items()} == shapes
        _require(same, f"{name} has other tensors than the original", "Change values only: the user's file has to fit.")
        _require(not repaired.network.training, f"{name} is in training mode", "Call eval() at the end.")
        scores = logits(repaired, to_tensor(images.pixels))
        wanted = (len(images), classifier.num_classes + candidate.rejects)
        usable = scores.shape == wanted and bool(scores.isfinite().all())
        _require(usable, f"{name} does not return finite logits (N, K)", "Check the repaired network.")
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
    _require(not printed.getvalue(), f"the method prints {printed.getvalue()[:40]!r}", "Put it into the figures.")
    _require(all(0 <= part <= 1 for part in told), f"progress is told {told}", "It takes the part done, 0 to 1.")


@contextlib.contextmanager
def _untouched(classifier: Classifier, images: LabelledImages) -> Iterator[None]:
    """Afterwards: weights, gradient flags, mode and images are as before."""
    next(classifier.parameters()).requires_grad_(False)  # so that "all on" and "all off" are both wrong
    before, pixels = _weights(classifier), images.pixels.copy()
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    yield
    _require(_equal_weights(before, _weights(classifier)), "the classifier's weights were changed", "Use clone().")
    same = flags == [parameter.requires_grad for parameter in classifier.parameters()]
    _require(same, "the parameters' requires_grad flags were changed", "Restore them in a finally clause.")
    _require(not classifier.network.training, "the classifier was left in training mode", "Use clone().")
    _require(np.array_equal(pixels, images.pixels), "the images were changed", "Work on a copy.")


def _require(holds: bool, what: str, hint: str) -> None:
    if not holds:
        raise ContractError(f"{what}. {hint}")


def _plain(value: _T) -> _T:
    """``value`` after a trip through JSON."""
    return json.loads(json.dumps(value, allow_nan=False))  # type: ignore[no-any-return]


def _check_plain(value: object, what: str) -> None:
    try:
        same = _plain(value) == value
    except (TypeError, ValueError) as error:
        raise ContractError(f"{what} cannot be written as JSON: {error}. Use numbers, strings, lists.") from error
    _require(same, f"{what} come back from JSON changed", "Use lists for tuples and strings for keys.")


def _as_plain(judgement: Judgement) -> object:
    findings = [finding.to_json() for finding in judgement.findings]
    return _plain([findings, judgement.p_value, dict(judgement.figures), judgement.note])


def _weights(classifier: Classifier) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in classifier.state_dict().items()}


def _equal_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _equal_triggers(one: Sequence[Trigger], other: Sequence[Trigger]) -> bool:
    return len(one) == len(other) and all(
        a.target == b.target and torch.equal(a.mask, b.mask) and torch.equal(a.pattern, b.pattern)
        for a, b in zip(one, other, strict=True)
    )
