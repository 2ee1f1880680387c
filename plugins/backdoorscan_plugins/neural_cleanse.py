"""Neural Cleanse: a backdoored label needs an unusually small trigger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.inversion import Schedule, invert
from backdoorscan.ops.metrics import attack_success_rate
from backdoorscan.ops.outliers import Spread, anomaly_index, small_finalists, small_outliers
from backdoorscan.ops.outsider import learn
from backdoorscan.ops.stamping import needed_opacity
from backdoorscan.plugin.detector import MANY_CLASSES, Detector, heats, last_round, shortlist, split_images
from backdoorscan.plugin.method import Context, option

_IMAGES_AT_ONCE = 512
"""Stamped images in one forward pass: more gains nothing on two cores and costs memory."""

_WEAKENED = 200
"""Images on which the triggers of finalists are made fainter."""

_LIKELY = 10
"""Classes kept of the mean prediction on stamped images."""

RACE: Mapping[str, Any] = {
    "restarts": 1,
    "learning_rate": 0.3,
    "init_cost": 1e-2,
    "cost_multiplier": 1.15,
    "early_stop_patience": 10**6,
}
"""A race is short and goes on from where the last round ended, so the mask has to shrink faster and never to rest."""

_ROUNDS, _FINALISTS = 3, 10
"""Of a race, and the labels left at its end."""

_PRIOR = Spread(sd=0.42, weight=10)
"""Standard deviation of log L1 over the labels, the suspected one left out: 0.16 to 1.0, median 0.45, over 58 small
networks of strangers and of our own. A little under the median: the widest are nets whose labels mostly have small
triggers by nature, which no choice would make easy to judge."""


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Detector):
    """Labels to which an unusually small trigger leads.

    For every label t a mask m and a pattern p are searched that send clean images of all other classes to t,

        min  CE(f((1 - m) x + m p), t) + cost · ‖m‖₁,

    with the cost adapted so that the success rate stays at the threshold. A backdoored label has a trigger already, so
    its smallest mask is far smaller than the others'.

    The paper's anomaly index (deviation of the L1 norm from the median in median absolute deviations; infected above
    2) is reported. The decision is another: the p-value of the smallest log L1 among N labels, with the spread
    moderated by that of clean networks. Labels for which no trigger was found are left out of the comparison, and so
    are labels that are unusually hard.

    Beside it stands the other statistic in use: with a label's trigger stamped on clean images, the mean absolute
    deviation of the predicted class from the label. Its minimum names the label whose trigger is most reliable.

    It sees triggers that work from every class: patches, and with luck blended patterns. It does not see all-to-all
    and source-specific backdoors, for which no universal trigger exists.

    Of more than 64 classes only a shortlist that cheaper detectors made is examined, and random labels beside it, all
    on equal terms: in a race each round keeps the quarter with the smallest triggers and gives them twice the steps.
    The smallest trigger, as faint as it may be to send half of the images over, is then compared with those of the
    other finalists, which are the smallest of many themselves.

    The defaults batch all labels and take a hundredth of the original's work. The original's schedule:
    steps=1000 batches=31 batch_size=32 restarts=1 learning_rate=0.1 patience=5 cost_multiplier=2 smoothing=0
    attack_success_threshold=0.99 early_stop_threshold=1 early_stop_patience=25.
    """

    id = "neural-cleanse"
    paper = (
        "Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: Identifying and Mitigating Backdoor Attacks in "
        "Neural Networks. IEEE S&P 2019"
    )
    cost = 10.0
    blind_spots = ("all-to-all backdoors", "source-specific backdoors", "warping backdoors")

    steps: int = option(180, help="Steps of the cost schedule, at most.", minimum=1)
    batches: int = option(1, help="Gradient steps within one step of the schedule.", minimum=1)
    batch_size: int = option(5, help="Images per label and gradient step.", minimum=1)
    restarts: int = option(3, help="Independent starts per label; the smallest trigger counts.", minimum=1)
    screening: int = option(80, help="Steps after which only the best start of each label goes on.", minimum=1)
    learning_rate: float = option(0.15, help="Of Adam.", minimum=1e-6)
    init_cost: float = option(1e-3, help="Weight of the L1 norm when it sets in.", minimum=0)
    cost_multiplier: float = option(1.12, help="Factor by which the weight rises; falls by its power 1.5.", minimum=1)
    patience: int = option(1, help="Steps above (below) the threshold before the weight rises (falls).", minimum=1)
    attack_success_threshold: float = option(0.97, help="Success rate to hold.", minimum=0, maximum=1)
    smoothing: float = option(0.85, help="Weight of earlier steps in the success rate.", minimum=0, maximum=0.999)
    early_stop_threshold: float = option(0.99, help="Progress is an L1 norm under this part of the best.", minimum=0)
    early_stop_patience: int = option(25, help="Steps without progress before a label is done.", minimum=1)
    shortlist: int = option(80, help="Of many classes, as many suspects.", minimum=2)
    random_labels: int = option(16, help="Of many classes, as many random ones beside them.", minimum=0)
    race_steps: int = option(60, help="Of many classes, steps in the first round of the race.", minimum=1)
    held_out_success: float = option(0.6, help="Success on held-out images a trigger needs to count.", minimum=0)

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """Groups of labels that fit into one batch."""
        labels = shortlist(classifier, context, self.shortlist, self.random_labels)
        if classifier.num_classes > MANY_CLASSES and len(labels) > _FINALISTS:
            return heats(1, labels)
        size = max(1, _IMAGES_AT_ONCE // (self.batch_size * self.restarts))
        groups = [labels[start : start + size] for start in range(0, len(labels), size)]
        return [Unit(f"labels {group[0]}..{group[-1]}", group) for group in groups]

    def more_units(self, evidence: Sequence[Evidence], classifier: Classifier, context: Context) -> Sequence[Unit]:
        """The next round of the race, if there is one."""
        rows = last_round(evidence)
        if not rows or rows[0]["round"] in (0, _ROUNDS):
            return ()
        best = sorted(rows, key=_price)[: max(_FINALISTS, len(rows) // 4)]
        triggers = {trigger.target: trigger for part in evidence for trigger in part.triggers}
        labels = [row["label"] for row in best]
        return heats(rows[0]["round"] + 1, labels, [triggers[label] for label in labels])

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Search a trigger for each label of the unit."""
        if images is None:
            raise MethodError(f"{self.id} needs clean images.", hint="Pass --valid.")
        train, held_out = split_images(images, context)
        pixels, labels = to_tensor(train.pixels), torch.from_numpy(train.labels)
        lonely = [label for label in unit.labels if bool((labels == label).all())]
        if lonely:
            raise MethodError(
                f"{self.id} cannot examine label {lonely[0]}: the clean images hold no other class.",
                hint="Give images of several classes.",
            )
        schedule = Schedule(**{name: getattr(self, name) for name in Schedule.__dataclass_fields__})
        if unit.round > 0:
            schedule = replace(schedule, steps=self.race_steps * 2 ** (unit.round - 1), **RACE)
        generator = context.generator(self.id, unit.id)
        results, samples = invert(
            classifier, pixels, labels, unit.labels, schedule, generator, context.progress, unit.starts
        )
        test_pixels, test_labels = to_tensor(held_out.pixels), torch.from_numpy(held_out.labels)
        weakened = to_tensor(images.pixels[:_WEAKENED]) if unit.round == _ROUNDS else None
        outsider = None if unit.round else learn(pixels, labels, classifier.num_classes)
        rows: list[dict[str, Any]] = []
        for label, result in zip(unit.labels, results, strict=True):
            stamped = result.trigger.stamp(test_pixels)
            scores = logits(classifier, stamped)
            predicted = scores.argmax(1)
            rate = attack_success_rate(predicted, test_labels, label)
            likely = scores.softmax(1).mean(0).topk(min(_LIKELY, classifier.num_classes))
            rows.append(
                {
                    "label": label,
                    "round": unit.round,
                    "l1": round(result.trigger.l1, 4),
                    "succeeded": result.succeeded and (rate is None or rate >= self.held_out_success),
                    "attack_success_rate": rate,
                    "prediction_deviation": round(float((predicted - label).abs().double().mean()), 4),
                    "predictions": {
                        str(k): round(v, 4)
                        for k, v in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
                    },
                    "steps": result.steps,
                    "curves": {
                        "loss": [round(value, 4) for value in result.loss],
                        "l1": [round(value, 2) for value in result.l1],
                        "success": [round(value, 4) for value in result.success],
                    },
                }
            )
            if outsider is not None and rate is not None:
                others = test_labels != label
                natural = outsider.natural(test_pixels[others], stamped[others], label)
                rows[-1] |= {name: round(value, 4) for name, value in natural.items()}
            if weakened is not None:
                rows[-1]["half_opacity"] = needed_opacity(classifier, result.trigger, weakened, 0.5)
        return Evidence(
            figures={"labels": rows}, triggers=[result.trigger for result in results], gradient_samples=samples
        )

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Compare the labels that have a trigger."""
        rows = last_round(evidence)
        triggers = {trigger.target: trigger for part in evidence for trigger in part.triggers}
        found = [row for row in rows if row["succeeded"]]
        figures: dict[str, Any] = {"examined": len(rows), "succeeded": len(found)}
        if len(found) < 2:
            return Judgement(
                p_value=None, figures=figures, note="A trigger was found for fewer than two labels: nothing to compare."
            )
        sizes = np.array([max(row["l1"], 1e-3) for row in found])
        indices = anomaly_index(sizes)
        # How much mask brings the last images over is chance; at the end of a race, where little tells, half count.
        logs = [math.log(max(row["l1"] * (row.get("half_opacity") or 1.0), 1e-3)) for row in found]
        if rows[0]["round"]:
            first = [row for part in evidence for row in part.figures["labels"] if row["round"] == 1]
            field = [math.log(max(row["l1"], 1e-3)) for row in first]
            outliers = small_finalists(logs, field, level=0.05, most=max(1, len(found) // 3))
        else:
            most = min(max(1, len(found) // 5), 16)
            outliers = small_outliers(logs, tested=len(rows), level=0.01, most=most, prior=_PRIOR)
        figures |= {
            "median_l1": float(np.median(sizes)),
            "smallest_deviation": min(rows, key=lambda row: row["prediction_deviation"])["label"],
            "ratio": float(np.median(sizes) / sizes.min()),
            "anomaly_index": {str(row["label"]): round(float(i), 3) for row, i in zip(found, indices, strict=True)},
        }
        findings = [
            Finding(
                target_label=found[position]["label"],
                p_value=p_value,
                score=float(indices[position]),
                trigger=triggers[found[position]["label"]],
                attack_success_rate=found[position]["attack_success_rate"],
            )
            for position, p_value in zip(outliers.index, outliers.p_values, strict=True)
        ]
        ranking = [found[position]["label"] for position in np.argsort(logs, kind="stable")]
        return Judgement(findings=findings, p_value=outliers.p_values[0], ranking=ranking, figures=figures)


def _price(row: Mapping[str, Any]) -> float:
    """Pixels of a trigger per held-out image it sends over: in the middle of a race few are reliable yet."""
    rate = row["attack_success_rate"]
    return float(row["l1"] / max(1.0 if rate is None else rate, 0.01))


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The methods of this module."""
    return [NeuralCleanse]
