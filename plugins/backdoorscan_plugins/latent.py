"""Evidence from the last layer: which classes lie unusually near, in weights and in feature space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from backdoorscan import graph, hookimpl
from backdoorscan.classifier import Classifier, here, to_tensor
from backdoorscan.errors import MethodError, UnsupportedModelError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.latent import row_evidence, step_lengths
from backdoorscan.ops.shift import head_features
from backdoorscan.plugin.detector import MANY_CLASSES, Detector
from backdoorscan.plugin.method import Context, option

_MOST_ROWS = 64
"""Labels whose figures go into the report."""

_NO_HEAD = "This network does not end in a dense layer with a row per class."
_NOTHING: Mapping[str, Any] = {"examined": 0, "labels": [], "ranking": []}


@dataclass(frozen=True, kw_only=True)
class HeadWeights(Detector):
    """Classes whose output weights are unusually large, from the weights alone.

    For every class the sum of its weights in the last dense layer, and its bias, in robust deviations above the median
    class. It takes milliseconds and no images. Weights alone prove nothing, and hiding from it is easy, so it ranks the
    classes for the detectors that follow and gives no verdict of its own.
    """

    id = "head-weights"
    needs_images = False
    cost = 0.1

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Read the rows of the head."""
        head = _head(classifier)
        if head is None:
            return Evidence(figures=_NOTHING)
        return Evidence(figures=_rows(row_evidence(*head), unit.labels, "deviation", largest=True))

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Rank the classes."""
        ranking = [row["label"] for part in evidence for row in part.figures["labels"]]
        note = "It ranks the classes for the detectors that follow." if ranking else _NO_HEAD
        return Judgement(p_value=None, ranking=ranking, note=note)


@dataclass(frozen=True, kw_only=True)
class LatentShift(Detector):
    """Classes that every image's features can reach by an unusually short step.

    For every class k, how far the features φ(x) of clean images must move along the class's own direction until k
    overtakes each other class on most of them. A trigger has to make that step, so training on it makes the step
    short. It takes one pass over the images and one product of matrices for all classes.

    With few classes the steps differ by nature and it only ranks. With many, the lengths of clean classes are close to
    log-normal at their lower end, and the p-value is that of the shortest among as many.
    """

    id = "latent-shift"
    cost = 0.5
    blind_spots = ("all-to-all backdoors", "source-specific backdoors")

    part: float = option(
        0.75, help="Each other class has to be overtaken on this part of the images.", minimum=0.5, maximum=1
    )

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Measure the steps."""
        if images is None:
            raise MethodError(f"{self.id} needs images.", hint="Pass --valid.")
        head = _head(classifier)
        features = None if head is None else head_features(classifier, to_tensor(images.pixels))
        if head is None or features is None or features.shape[1] != head[0].shape[1]:
            return Evidence(figures=_NOTHING)
        parts = (self.part, 0.5)
        steps = step_lengths(*head, features, parts)
        # Images of the class itself need no step: where they are many, only the others tell.
        labels = torch.from_numpy(images.labels)
        for label in (labels.bincount() > (1 - self.part) * len(labels)).nonzero().flatten().tolist():
            others = features[labels != label]
            steps[:, label] = step_lengths(*head, others, parts)[:, label] if len(others) else torch.inf
        lengths, median_lengths = steps
        figures = _rows(lengths, unit.labels, "step", largest=False)
        chosen = list(unit.labels)
        ranking = [chosen[i] for i in median_lengths[chosen].argsort(stable=True).tolist()]
        return Evidence(figures={**figures, "ranking": ranking[:_MOST_ROWS]})

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Test whether the shortest steps are too short."""
        figures = evidence[0].figures
        if not figures["labels"]:
            return Judgement(p_value=None, note=_NO_HEAD)
        if figures["examined"] <= MANY_CLASSES:
            note = "With so few classes it ranks them for the detectors that follow."
            return Judgement(p_value=None, ranking=figures["ranking"], note=note)
        # Where the shortest of clean classes would lie, from how far the shortest twentieth lies below the median.
        spread = max(math.log(figures["median"] / max(figures["low"], 1e-9)) / float(stats.norm.isf(_LOW)), 1e-6)
        findings = []
        for row in figures["labels"]:
            score = math.log(figures["median"] / max(row["step"], 1e-9)) / spread
            p_value = min(1.0, figures["examined"] * float(stats.t.sf(score, _TAIL)))
            findings.append(Finding(target_label=row["label"], p_value=p_value, score=score))
        findings = [f for f in findings if f.p_value <= 0.1] or findings[:1]
        return Judgement(
            findings=findings, p_value=findings[0].p_value, ranking=figures["ranking"], figures={"spread": spread}
        )


_LOW = 0.05
"""Quantile of the steps that stands for the lower end."""

_TAIL = 15
"""Degrees of freedom of the t distribution that stands for the lower end: heavier than normal."""


def _head(classifier: Classifier) -> tuple[Tensor, Tensor] | None:
    """Weights (K, D) and bias (K,) of the last layer, if it is dense and has a row per class."""
    try:
        network = classifier.graph_module
        head = graph.layer(network, graph.head_node(network))
    except UnsupportedModelError:
        return None
    if not isinstance(head, torch.nn.Linear) or len(head.weight) != classifier.num_classes:
        return None
    weights = here(head.weight.detach())
    return weights, weights.new_zeros(len(weights)) if head.bias is None else here(head.bias.detach())


def _rows(values: Tensor, labels: Sequence[int], name: str, *, largest: bool) -> dict[str, Any]:
    """The most suspicious labels with their figures, and what is needed to judge them."""
    chosen = values[list(labels)].double()
    # What cannot be reached at all is not suspicious, and no number.
    order = [i for i in chosen.argsort(descending=largest, stable=True).tolist() if math.isfinite(chosen[i])]
    finite = chosen[chosen.isfinite()].numpy()
    low = float(np.quantile(finite, _LOW)) if len(finite) else 0.0
    return {
        "examined": len(labels),
        "median": float(np.median(finite)) if len(finite) else 0.0,
        "low": low,
        "labels": [{"label": labels[i], name: round(float(chosen[i]), 5)} for i in order[:_MOST_ROWS]],
    }


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [HeadWeights, LatentShift]
