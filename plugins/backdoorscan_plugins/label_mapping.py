"""All-to-all backdoors: one small trigger that sends every class to another class of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.mapping import MappingSchedule, find_mapping
from backdoorscan.ops.outliers import Null
from backdoorscan.plugin.detector import Detector, recognised, split_images
from backdoorscan.plugin.method import Context, option

_CLEAN = Null(mean=0.36, sd=0.20, count=78)
"""The statistic of clean networks (benchmarks/calibrate.py)."""

_FEWEST = 3
"""Classes with images from which a mapping can be told from one target."""


@dataclass(frozen=True, kw_only=True)
class LabelMapping(Detector):
    """One small trigger that sends every class to another class of its own.

    An all-to-all backdoor gives every class a target of its own, often the next one, so no label has a universal
    trigger. Here the trigger is sought without saying where it should lead: predictions on stamped images are to be
    wrong, certain and spread over all classes. The assignment of classes to classes that shows is then pursued with a
    shrinking mask. The cost does not grow with the number of pairs.

    The statistic is ln(pixels of the image / L1 norm of the mask) times the share of held-out images that arrive where
    the mapping says. In clean networks different classes can be sent different ways only by a mask over half the image.
    """

    id = "label-mapping"
    paper = "Gu, Dolan-Gavitt, Garg: BadNets. 2017, section 4 (the all-to-all attack); the search is this project's own"
    cost = 5.0
    blind_spots = ("source-specific backdoors",)
    covers = ("all-to-all backdoors",)
    share = 0.25

    free_steps: int = option(40, help="Steps without a mapping in mind.", minimum=1)
    steps: int = option(160, help="Steps towards the mapping found.", minimum=1)
    batch_size: int = option(30, help="Images per start and step; at least one per class.", minimum=2)
    restarts: int = option(2, help="Independent starts.", minimum=1)
    learning_rate: float = option(0.15, help="Of Adam.", minimum=1e-6)
    success: float = option(0.9, help="Success rate to hold while the mask shrinks.", minimum=0, maximum=1)
    hopeless: float = option(0.6, help="Success rate under which it gives up.", minimum=0, maximum=1)
    patience: int = option(40, help="Steps towards the mapping before it may give up.", minimum=1)

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """One, unless the user looks at some labels only."""
        some = context.labels is not None and len(context.labels) < classifier.num_classes
        return [] if some else [Unit("all classes", tuple(range(classifier.num_classes)))]

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Search the mapping and measure it on images it has not seen."""
        if images is None:
            raise MethodError(f"{self.id} needs images.", hint="Pass --valid.")
        train, held_out = (recognised(classifier, part) for part in split_images(images, context))
        present = torch.from_numpy(train.labels).bincount(minlength=classifier.num_classes)
        if int((present >= 2).sum()) < max(_FEWEST, min(8, classifier.num_classes // 2)):
            return Evidence(figures={"classes": int((present >= 2).sum())})
        schedule = MappingSchedule(**{name: getattr(self, name) for name in MappingSchedule.__dataclass_fields__})
        schedule = replace(schedule, batch_size=min(max(self.batch_size, int((present > 0).sum())), 256))
        pixels, labels = to_tensor(train.pixels), torch.from_numpy(train.labels)
        found, samples = find_mapping(
            classifier, pixels, labels, schedule, context.generator(self.id), context.progress
        )
        test_labels = torch.from_numpy(held_out.labels)
        arrived = logits(classifier, found.trigger.stamp(to_tensor(held_out.pixels))).argmax(1)
        arrived = arrived == found.leads_to[test_labels]
        success = {int(label): float(arrived[test_labels == label].double().mean()) for label in test_labels.unique()}
        rate = float(arrived.double().mean())
        figures = {
            "classes": len(success),
            "held": found.held,
            "l1": round(found.trigger.l1, 4),
            "success": round(rate, 4),
            "statistic": round(rate * -math.log(max(found.trigger.area, 1e-6)), 4),
            "mapping": {str(label): int(found.leads_to[label]) for label in success},
            "success_per_class": {str(label): round(value, 4) for label, value in success.items()},
        }
        return Evidence(figures=figures, triggers=[found.trigger] if found.held else [], gradient_samples=samples)

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Compare the statistic with that of clean networks."""
        figures = dict(evidence[0].figures) if evidence else {}
        if "statistic" not in figures:
            return Judgement(p_value=None, figures=figures, note="Too few images or labels to look for a mapping.")
        score, p_value = _CLEAN.score(figures["statistic"]), _CLEAN.p_value(figures["statistic"])
        worked = {int(k): v for k, v in figures["success_per_class"].items() if v >= 0.5}
        findings = [
            Finding(
                source_label=source,
                target_label=figures["mapping"][str(source)],
                p_value=p_value,
                score=score,
                trigger=replace(trigger, target=figures["mapping"][str(source)]),
                attack_success_rate=rate,
            )
            for trigger in evidence[0].triggers
            for source, rate in worked.items()
        ]
        return Judgement(findings=findings, p_value=p_value if findings else 1.0, figures=figures)


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [LabelMapping]
