"""Backdoors without a patch: perturbations of the whole image, added or warped."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.inversion import Schedule
from backdoorscan.ops.outliers import Null, Spread, small_outliers
from backdoorscan.ops.perturbation import Additive, Family, Found, Warp, find_perturbations
from backdoorscan.ops.separation import retrained_head, seen, separation
from backdoorscan.ops.shift import mean_trigger
from backdoorscan.plugin.detector import MANY_CLASSES, Detector, examined_labels, split_images
from backdoorscan.plugin.method import Context, option
from backdoorscan.trigger import Trigger

_AT_A_TIME = 10
"""Labels in one batch."""

_TRIGGER_SUCCESS = 0.8
"""Success on held-out images from which a perturbation passes for a trigger that can be stamped."""

_TRIED = 100
"""Images on which a trigger is made strong enough."""

_PRIOR = Spread(sd=0.4, weight=10)
"""Standard deviation of the log size over the labels of clean networks, about."""

_CLEAN_WARP = Null(mean=0.64, sd=0.49, count=71)
"""The largest statistic of a clean network (benchmarks/calibrate.py)."""


@dataclass(frozen=True, kw_only=True)
class _Perturbations(Detector):
    """What both kinds share: a search per label, and the comparison of the sizes."""

    blind_spots = ("all-to-all backdoors", "source-specific backdoors")

    steps: int = option(120, help="Gradient steps.", minimum=1)
    batch_size: int = option(6, help="Images per label and gradient step.", minimum=1)
    attack_success_threshold: float = option(0.9, help="Success rate to hold.", minimum=0, maximum=1)
    cost_multiplier: float = option(1.12, help="Factor by which the weight of the size rises.", minimum=1)
    patience: int = option(30, help="Steps without progress before a label is done.", minimum=1)
    learning_rate: float
    init_cost: float

    @abstractmethod
    def _family(self, rows: int, classifier: Classifier, generator: torch.Generator) -> Family: ...

    def _trigger(self, found: Found, classifier: Classifier, pixels: torch.Tensor, label: int) -> list[Trigger]:
        """The perturbation as mask and pattern, where it can be one."""
        return []

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """Groups of labels; none where there are many."""
        labels = examined_labels(classifier, context)
        if classifier.num_classes > MANY_CLASSES:
            return []
        groups = [labels[at : at + _AT_A_TIME] for at in range(0, len(labels), _AT_A_TIME)]
        return [Unit(f"labels {group[0]}..{group[-1]}", group) for group in groups]

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Search a perturbation for each label of the unit."""
        if images is None:
            raise MethodError(f"{self.id} needs images.", hint="Pass --valid.")
        train, held_out = split_images(images, context)
        pixels, labels = to_tensor(train.pixels), torch.from_numpy(train.labels)
        test_pixels, test_labels = to_tensor(held_out.pixels), torch.from_numpy(held_out.labels)
        lonely = [label for label in unit.labels if bool((labels == label).all() or (test_labels == label).all())]
        if lonely:
            raise MethodError(
                f"{self.id} cannot examine label {lonely[0]}: the images hold no other class.",
                hint="Give images of several classes.",
            )
        generator = context.generator(self.id, unit.id)
        family = self._family(len(unit.labels), classifier, generator)
        found, samples = find_perturbations(
            classifier, pixels, labels, unit.labels, family, self._schedule(), generator, context.progress
        )
        head = retrained_head(seen(classifier, pixels).features, labels, classifier.num_classes)
        clean = seen(classifier, test_pixels)
        rows: list[dict[str, Any]] = []
        triggers: list[Trigger] = []
        for label, one in zip(unit.labels, found, strict=True):
            others = test_labels != label
            stamped = seen(classifier, one.apply(test_pixels[others]))
            figures = separation(clean[others], stamped, test_labels[others], label, head)
            rows.append(
                {
                    "label": label,
                    "size": round(one.size, 5),
                    "succeeded": one.succeeded,
                    **{name: round(value, 5) for name, value in figures.items()},
                }
            )
            if one.succeeded:
                triggers += self._trigger(one, classifier, test_pixels[others], label)
        return Evidence(figures={"labels": rows}, triggers=triggers, gradient_samples=samples)

    def _schedule(self) -> Schedule:
        return Schedule(
            steps=self.steps,
            batches=1,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            restarts=1,
            screening=self.steps,
            init_cost=self.init_cost,
            cost_multiplier=self.cost_multiplier,
            patience=1,
            attack_success_threshold=self.attack_success_threshold,
            smoothing=0.85,
            early_stop_threshold=0.99,
            early_stop_patience=self.patience,
        )

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Compare the sizes; a label that was never reached counts as large."""
        rows: list[dict[str, Any]] = [row for part in evidence for row in part.figures["labels"]]
        triggers = {trigger.target: trigger for part in evidence for trigger in part.triggers}
        if len(rows) < 3 or not any(row["succeeded"] for row in rows):
            return Judgement(p_value=None, note="It reached too few labels to compare.")
        sizes = reached_sizes(rows)
        outliers = small_outliers(sizes, tested=len(rows), level=0.01, most=max(1, len(rows) // 5), prior=_PRIOR)
        findings = [
            Finding(
                target_label=rows[position]["label"],
                p_value=p_value,
                score=z,
                trigger=triggers.get(rows[position]["label"]),
                attack_success_rate=rows[position]["success"],
            )
            for position, p_value, z in zip(outliers.index, outliers.p_values, outliers.z, strict=True)
        ]
        ranking = [rows[position]["label"] for position in np.argsort(sizes, kind="stable")]
        return Judgement(findings=findings, p_value=outliers.p_values[0], ranking=ranking)


def reached_sizes(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The log size of each label; for one that was never reached, of the largest of any."""
    largest = max((row["size"] for row in rows), default=1.0)
    return [math.log(max(row["size"] if row["succeeded"] else largest, 1e-6)) for row in rows]


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation(_Perturbations):
    """Labels to which an unusually weak pattern leads that is added to the whole image.

    For every label t a perturbation δ is searched, the same for all images,

        min  CE(f(clip(x + δ)), t) + cost · ‖δ‖₂,

    with the cost adapted as in Neural Cleanse. A pattern that is blended over the whole image has no small mask, so
    Neural Cleanse finds its label only by luck; its norm is small all the same. The p-value is that of the smallest
    log norm. A strong pattern, as a sinusoid over the whole image, is no weaker than what clean classes need.
    """

    id = "perturbation"
    paper = (
        "Moosavi-Dezfooli, Fawzi, Fawzi, Frossard: Universal Adversarial Perturbations. CVPR 2017; with the cost "
        "schedule of Neural Cleanse"
    )
    cost = 12.0

    learning_rate: float = option(0.02, help="Of Adam.", minimum=1e-6)
    init_cost: float = option(1e-2, help="Weight of the size when it sets in.", minimum=0)

    def _family(self, rows: int, classifier: Classifier, generator: torch.Generator) -> Family:
        return Additive(rows, classifier.input_shape, generator)

    def _trigger(self, found: Found, classifier: Classifier, pixels: torch.Tensor, label: int) -> list[Trigger]:
        trigger, rate = mean_trigger(classifier, found.parameters, pixels[:_TRIED], label, _TRIGGER_SUCCESS)
        return [trigger] if rate >= _TRIGGER_SUCCESS else []


@dataclass(frozen=True, kw_only=True)
class WarpInversion(_Perturbations):
    """Labels to which an unusually slight warping of the image leads.

    For every label t displacements on a grid of 5 × 5 points are searched, interpolated over the image as in WaNet
    and the same for all images, with the least root mean square that sends images of other classes to t. The
    statistic of a label is ln(median size of the others / its size) + 2 · second - transfer, with how often the true
    class stays the second choice and how well the warp does with a head that was trained anew on clean images. It
    gives no trigger that could be stamped, so repairs that need one cannot use it.
    """

    id = "warp"
    covers = ("warping backdoors",)
    share = 0.5
    paper = "Nguyen, Tran: WaNet - Imperceptible Warping-based Backdoor Attack. ICLR 2021, section 3.2 (the trigger)"
    cost = 13.0

    learning_rate: float = option(0.1, help="Of Adam.", minimum=1e-6)
    init_cost: float = option(1e-1, help="Weight of the size when it sets in.", minimum=0)

    def _family(self, rows: int, classifier: Classifier, generator: torch.Generator) -> Family:
        return Warp(rows, classifier.input_shape, generator)

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Compare the largest statistic with that of clean networks."""
        rows: list[dict[str, Any]] = [row for part in evidence for row in part.figures["labels"]]
        if len(rows) < 3:
            return Judgement(p_value=None, note="It looked at too few labels to compare.")
        findings = []
        for row, value in zip(rows, warp_statistics(rows), strict=True):
            score = _CLEAN_WARP.score(value)
            p_value = _CLEAN_WARP.p_value(value) if row["succeeded"] else 1.0
            rate = row["success"]
            findings.append(Finding(target_label=row["label"], p_value=p_value, score=score, attack_success_rate=rate))
        findings.sort(key=lambda finding: finding.p_value)
        ranking = [finding.target_label for finding in findings]
        strong = [finding for finding in findings if finding.p_value <= 0.05] or findings[:1]
        return Judgement(findings=strong, p_value=findings[0].p_value, ranking=ranking)


def warp_statistics(rows: Sequence[dict[str, Any]]) -> list[float]:
    """How suspicious each label's warp is; see ``WarpInversion``. Of a class without images the worst is assumed."""
    sizes = reached_sizes(rows)
    values = []
    for place, row in enumerate(rows):
        lead = float(np.median(sizes[:place] + sizes[place + 1 :])) - sizes[place]
        values.append(lead + 2 * row["second"] - row.get("transfer", 1.0))
    return values


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [UniversalPerturbation, WarpInversion]
