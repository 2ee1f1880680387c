"""Source-specific backdoors: a small trigger that works from one class and leaves all others alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.inversion import Schedule, invert
from backdoorscan.ops.outliers import Null
from backdoorscan.ops.separation import retrained_head, seen, separation
from backdoorscan.plugin.detector import Detector, heats, last_round, recognised, split_images
from backdoorscan.plugin.method import Context, option
from backdoorscan.trigger import Trigger
from backdoorscan_plugins.neural_cleanse import RACE, NeuralCleanse


@dataclass(frozen=True, kw_only=True)
class SourcePairs(Detector):
    """Pairs of classes between which a small trigger leads that leaves all other classes alone.

    A source-specific backdoor works from one class only, and its attacker trains it to do nothing to others. For every
    pair (source, target) a mask and a pattern are searched as in Neural Cleanse, with images of the source that have to
    become the target and as many images of other classes that have to keep their label. That second condition makes
    the small triggers between look-alikes, which every network has, large. The pairs run a race: each round keeps the
    most promising and gives them more steps.

    The statistic of a finalist is ln(success · pixels of the image / L1 norm) + retention + 2 · second - transfer: how
    much of the differences between the source's images is left in the features, how often the source stays the second
    choice, and how well the trigger does with a head that was trained anew on clean images. The pairs of more than 16
    classes are too many to look at.
    """

    id = "source-pairs"
    paper = "Gu, Dolan-Gavitt, Garg: BadNets. 2017 (single-target attack); the search is this project's own"
    cost = 20.0
    covers = ("source-specific backdoors",)
    share = 0.5

    most_classes: int = option(16, help="Of more classes there are too many pairs to look at.", minimum=3)
    steps: tuple[int, ...] = option(
        (12, 50, 100), help="Steps in each round; the last for all further ones.", minimum=1
    )
    batch_size: tuple[int, ...] = option(
        (2, 4, 5),
        help="Images of the source, and as many others, per pair and step, for each round.",
        minimum=1,
    )
    stay: tuple[int, ...] = option((14, 6), help="Pairs that stay after each round.", minimum=2)

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """All pairs, in pieces; none where there are too many."""
        classes = range(classifier.num_classes)
        if len(classes) > self.most_classes:
            return []
        targets = [label for label in classes if context.labels is None or label in context.labels]
        pairs = [(source, target) for source in classes for target in targets if source != target]
        return heats(1, [t for _, t in pairs], sources=[s for s, _ in pairs], at_a_time=45)

    def more_units(self, evidence: Sequence[Evidence], classifier: Classifier, context: Context) -> Sequence[Unit]:
        """The next round of the race, if there is one."""
        rows = last_round(evidence)
        number = rows[0]["round"] if rows else 0
        if not 0 < number <= len(self.stay):
            return ()
        best = (_promising(rows) if number == 1 else sorted(rows, key=_size))[: self.stay[number - 1]]
        latest = _latest(evidence)
        pairs = [_pair(row) for row in best]
        starts = [latest[pair] for pair in pairs]
        return heats(number + 1, [t for _, t in pairs], starts, [s for s, _ in pairs], at_a_time=10)

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Search a trigger for each pair of the unit."""
        if images is None:
            raise MethodError(f"{self.id} needs images.", hint="Pass --valid.")
        train, held_out = (recognised(classifier, part) for part in split_images(images, context))
        present = [set(part.labels.tolist()) for part in (train, held_out)]
        keep = [at for at, source in enumerate(unit.sources) if all(source in labels for labels in present)]
        if not keep or min(len(labels) for labels in present) < 3:
            return Evidence(figures={"labels": []})
        sources, targets = [unit.sources[at] for at in keep], [unit.labels[at] for at in keep]
        starts = [unit.starts[at] for at in keep] if unit.starts else []
        pixels, labels = to_tensor(train.pixels), torch.from_numpy(train.labels)
        settings = {name: getattr(NeuralCleanse(), name) for name in Schedule.__dataclass_fields__}
        steps, batch = (values[: unit.round][-1] for values in (self.steps, self.batch_size))
        settings |= {"steps": steps, "restarts": 1, "batch_size": batch}
        if unit.round > len(self.stay):
            settings |= RACE  # the pairs no longer part by who gets anywhere, but by how far
        generator = context.generator(self.id, unit.id)
        results, samples = invert(
            classifier,
            pixels,
            labels,
            targets,
            Schedule(**settings),
            generator,
            context.progress,
            starts=starts,
            sources=sources,
            bystanders=batch,
        )
        rows: list[dict[str, Any]] = []
        for source, label, result in zip(sources, targets, results, strict=True):
            rows.append(
                {
                    "source": source,
                    "label": label,
                    "round": unit.round,
                    "l1": round(result.trigger.l1, 4),
                    "area": result.trigger.area,
                    "succeeded": result.succeeded,
                    "loss": round(float(np.mean(result.loss)), 5),
                }
            )
        triggers = [result.trigger for result in results]
        if unit.round > len(self.stay):
            head = retrained_head(seen(classifier, pixels).features, labels, classifier.num_classes)
            for row, trigger in zip(rows, triggers, strict=True):
                row |= _measured(classifier, held_out, row, trigger, head)
        return Evidence(figures={"labels": rows}, triggers=triggers, gradient_samples=samples)

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Compare the best finalist with those of clean networks."""
        rows = last_round(evidence)
        if not rows or "retention" not in rows[0]:
            return Judgement(p_value=None, note="Too many classes, or too few images, to look at pairs of classes.")
        triggers = _latest(evidence)
        findings = []
        for row in rows:
            score = statistic(row)
            finding = Finding(
                source_label=row["source"],
                target_label=row["label"],
                p_value=_CLEAN.p_value(score),
                score=score,
                trigger=triggers[_pair(row)],
                attack_success_rate=row["success"],
            )
            findings.append(finding)
        findings.sort(key=lambda finding: finding.p_value)
        strong = [finding for finding in findings if finding.p_value <= 0.05] or findings[:1]
        return Judgement(findings=strong, p_value=findings[0].p_value, figures={"statistic": findings[0].score})


_CLEAN = Null(mean=5.35, sd=0.86, count=84)
"""The largest statistic of a clean network: of 78 of our own (benchmarks/calibrate.py) and six of strangers."""


def statistic(row: Mapping[str, Any]) -> float:
    """How suspicious a finalist is; 0 if its trigger does not work. Of a class without images the worst is assumed."""
    if not row["succeeded"] or row["success"] < 0.5:
        return 0.0
    size = math.log(max(row["area"], 1e-6) / row["success"])
    return float(row["retention"] + 2 * row["second"] - row.get("transfer", 1.0) - size)


def _measured(
    classifier: Classifier, images: LabelledImages, row: dict[str, Any], trigger: Trigger, head: Any
) -> dict[str, float]:
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    source, others = labels == row["source"], (labels != row["source"]) & (labels != row["label"])
    before, after = seen(classifier, pixels[source]), seen(classifier, trigger.stamp(pixels[source]))
    figures = separation(before, after, labels[source], row["label"], head)
    left = logits(classifier, trigger.stamp(pixels[others])).argmax(1)
    kept = float((left == labels[others]).double().mean()) if len(left) else 1.0
    return {name: round(value, 5) for name, value in {**figures, "kept": kept}.items()}


def _latest(evidence: Sequence[Evidence]) -> dict[tuple[int, int], Trigger]:
    """Each pair's trigger as of the last round it was in."""
    return {
        _pair(row): trigger
        for part in evidence
        for row, trigger in zip(part.figures["labels"], part.triggers, strict=True)
    }


def _pair(row: dict[str, Any]) -> tuple[int, int]:
    return row["source"], row["label"]


def _size(row: dict[str, Any]) -> tuple[bool, float]:
    return not row["succeeded"], row["l1"]


def _promising(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs in turn by two orders: how easy they are, and how easy for classes that are easy or hard by nature.

    The second is by what is left of the log losses after row and column medians are swept out (Tukey 1977).
    """
    easy = sorted(rows, key=lambda row: row["loss"])
    sources = sorted({row["source"] for row in rows})
    targets = sorted({row["label"] for row in rows})
    table = np.full((len(sources), len(targets)), np.nan)
    for row in rows:
        table[sources.index(row["source"]), targets.index(row["label"])] = math.log(max(row["loss"], 1e-3))
    for _ in range(5):
        table -= np.nanmedian(table, axis=1, keepdims=True)
        table -= np.nanmedian(table, axis=0, keepdims=True)
    odd = sorted(rows, key=lambda row: table[sources.index(row["source"]), targets.index(row["label"])])
    in_turn = [row for both in zip(easy, odd, strict=True) for row in both]
    return list({_pair(row): row for row in in_turn}.values())


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [SourcePairs]
