"""A second opinion on suspects: is a small trigger a backdoor, or the way to a class that is easy by nature?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Examined, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.outliers import Null
from backdoorscan.ops.separation import retrained_head, seen, separation
from backdoorscan.plugin.detector import MANY_CLASSES, Detector, split_images
from backdoorscan.plugin.method import Context, option
from backdoorscan_plugins.perturbations import reached_sizes

_INVERSION, _PERTURBATION, _LATENT = "neural-cleanse", "perturbation", "latent-shift"
_TOGETHER = (_INVERSION, _LATENT)


@dataclass(frozen=True, kw_only=True)
class Confirmation(Detector):
    """All evidence on the labels with the smallest triggers, weighed together.

    A small trigger alone proves little: networks with batch normalisation have one for every label, and some class is
    always easier than the rest. So for each suspect of Neural Cleanse it asks, on images the trigger was not made
    from: how small is it, in the image and beside the other labels' (``size``, ``ratio``)? Does it work from every
    class, and by a clear lead (``least``, ``margin``)? Does the true class stay the second choice under it
    (``second``), and does a head trained anew on clean images not know it (``transfer``)? Would a classifier that knows
    nothing but clean images follow it too, and sooner than other labels' triggers (``natural``, ``oddity``)? How short
    is the step in feature space (``latent``), and how weak a pattern over the whole image does the same
    (``pattern_ratio``)?

    The answers are weighed by a logistic regression (docs/benchmarks.md tells how it does on attacks it was not fitted
    on), and the suspect's score is compared with the largest ones of clean networks. That, or the p-value of Neural
    Cleanse itself, whichever is smaller, counts twice.

    With more than 64 classes the p-values of Neural Cleanse and of ``latent-shift`` for the same label together, by
    Fisher's method, take the place of the score. Where it has an answer, it takes the place of the verdicts of Neural
    Cleanse, ``perturbation`` and ``latent-shift``.
    """

    id = "confirmation"
    cost = 50.0
    confirms = (_INVERSION, _PERTURBATION, _LATENT)
    blind_spots = ("all-to-all backdoors", "source-specific backdoors", "warping backdoors")

    suspects: int = option(4, help="Labels examined again: those with the smallest triggers.", minimum=1)

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """The labels with the smallest triggers: a short latent step alone may be that of a network fed wrongly."""
        earlier = context.earlier.get(_INVERSION)
        if earlier is None:
            return []
        triggers = {trigger.target: trigger for part in earlier.evidence for trigger in part.triggers}
        labels = earlier.judgement.ranking[: self.suspects]
        return [Unit(f"label {label}", (label,), starts=(triggers[label],)) for label in labels]

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Collect the answers for one suspect."""
        if images is None:
            raise MethodError(f"{self.id} needs images.", hint="Pass --valid.")
        (label,), (trigger,) = unit.labels, unit.starts
        train, held_out = split_images(images, context)
        labels = torch.from_numpy(held_out.labels)
        others = labels != label
        if not bool(others.any()):
            raise MethodError(f"{self.id} cannot examine label {label}: the images hold no other class.")
        known = seen(classifier, to_tensor(train.pixels))
        head = retrained_head(known.features, torch.from_numpy(train.labels), classifier.num_classes)
        pixels = to_tensor(held_out.pixels)[others]
        before, after = seen(classifier, pixels), seen(classifier, trigger.stamp(pixels))
        figures = separation(before, after, labels[others], label, head)
        answered = {name: context.earlier[name].judgement for name in _TOGETHER if name in context.earlier}
        figures |= {f"p_{name}": _p_value(j, label) for name, j in answered.items() if j.p_value is not None}
        if classifier.num_classes <= MANY_CLASSES:
            figures |= _compared(label, trigger.area, context.earlier)
        figures = {name: value if name.startswith("p_") else round(value, 5) for name, value in figures.items()}
        return Evidence(figures={"label": label, **figures}, triggers=[trigger])

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Weigh the answers."""
        if not evidence:
            return Judgement(p_value=None, note="It has nothing to confirm: Neural Cleanse found no trigger.")
        judged = [_judged(part.figures) for part in evidence]
        scores, p_values = [score for score, _ in judged], [p_value for _, p_value in judged]
        order = np.argsort(p_values, kind="stable").tolist()
        findings = [
            Finding(
                target_label=evidence[at].figures["label"],
                p_value=p_values[at],
                score=scores[at],
                attack_success_rate=evidence[at].figures["success"],
                trigger=evidence[at].triggers[0] if evidence[at].triggers else None,
            )
            for at in order
            if p_values[at] <= 0.05 or at == order[0]
        ]
        return Judgement(findings=findings, p_value=findings[0].p_value, figures={"score": scores[order[0]]})


WEIGHTS: Mapping[str, tuple[float, float, float]] = {
    "size": (-3.16, 1.00, -0.91),
    "ratio": (0.85, 0.88, 0.84),
    "least": (0.71, 0.13, 0.48),
    "margin": (0.91, 0.37, 0.28),
    "natural": (0.32, 0.60, -1.20),
    "oddity": (0.02, 0.45, 0.77),
    "second": (0.69, 0.16, 0.62),
    "transfer": (0.74, 0.21, -0.64),
    "latent": (0.36, 0.97, 0.73),
    "pattern_ratio": (0.43, 0.48, 0.55),
}
"""Figure -> its mean and standard deviation over the fitted suspects, and its weight (benchmarks/calibrate.py)."""

_CLEAN = Null(mean=-0.07, sd=1.52, count=78)
"""The largest score of a clean network, by weights fitted without its like."""

_REFERENCE_CLASSES = 10
_SPREAD = 0.42
"""What the ratio of clean networks was measured with, and by how much log L1 norms of clean labels differ."""


def suspicion(figures: Mapping[str, Any]) -> float:
    """The weighed sum of the standardised figures; one that is missing counts as ordinary."""
    parts = [(figures[name] - mean) / sd * weight for name, (mean, sd, weight) in WEIGHTS.items() if name in figures]
    return float(np.clip(parts, -10, 10).sum())


def _judged(figures: Mapping[str, Any]) -> tuple[float, float]:
    """Score and p-value of a suspect."""
    p_values = [max(figures[f"p_{name}"], 1e-300) for name in _TOGETHER if f"p_{name}" in figures]
    if "size" in figures:
        score = suspicion(figures)
        own = _CLEAN.p_value(score)
    else:
        score = -2 * sum(map(math.log, p_values))  # Fisher 1932
        own = float(stats.chi2.sf(score, 2 * len(p_values))) if p_values else 1.0
    return score, min(1.0, 2 * min(own, *p_values[:1], 1.0))


def _p_value(judgement: Judgement, label: int) -> float:
    """What an earlier detector said of the label; 1 if nothing."""
    return next((finding.p_value for finding in judgement.findings if finding.target_label == label), 1.0)


def _compared(label: int, area: float, earlier: Mapping[str, Examined]) -> dict[str, float]:
    """The label beside the others, in the evidence of the earlier detectors."""
    figures = {"size": math.log(max(area, 1e-6))}
    rows = [row for part in earlier[_INVERSION].evidence for row in part.figures["labels"]]
    sizes = {row["label"]: math.log(max(row["l1"], 1e-3)) for row in rows if row["succeeded"]}
    natural = {row["label"]: row["natural"] for row in rows if "natural" in row}
    if len(natural) > 1 and label in natural:
        figures |= {"natural": natural[label], "oddity": _lead(natural, label)}
    if len(sizes) > 1 and label in sizes:
        # The smallest of more labels lies further below their median by chance.
        excess = _SPREAD * (_smallest(len(rows)) - _smallest(_REFERENCE_CLASSES))
        figures["ratio"] = _lead(sizes, label) - max(excess, 0.0)
    if _PERTURBATION in earlier:
        rows = [row for part in earlier[_PERTURBATION].evidence for row in part.figures["labels"]]
        norms = dict(zip((row["label"] for row in rows), reached_sizes(rows), strict=True))
        if len(norms) > 1 and label in norms:
            figures["pattern_ratio"] = _lead(norms, label)
    if _LATENT in earlier:
        rows = [row for part in earlier[_LATENT].evidence for row in part.figures["labels"]]
        steps = {row["label"]: math.log(max(row["step"], 1e-3)) for row in rows}
        if len(steps) > 1 and label in steps:
            figures["latent"] = _lead(steps, label)
    return figures


def _lead(values: Mapping[int, float], label: int) -> float:
    """How far a label's value lies below the median of the others."""
    return float(np.median([value for other, value in values.items() if other != label])) - values[label]


def _smallest(count: int) -> float:
    """About how many standard deviations the smallest of ``count`` normal values lies below their mean."""
    return -float(stats.norm.ppf(0.625 / (count + 0.25)))


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [Confirmation]
