"""GangSweep: generators that sweep out the perturbations that lead to a label, to detect backdoors and reject them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.ops.generator import GeneratorSchedule, MaskGenerator, train_generator
from backdoorscan.ops.outliers import Spread, small_outliers
from backdoorscan.ops.shift import clean_spread, head_features, mean_trigger, measure_shift, persistence
from backdoorscan.plugin.detector import Detector, split_images
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.trigger import Trigger
from backdoorscan_plugins.retrain import RejectingRepairer

_PAPER = "Zhu, Ning, Wang, Xin, Wang: GangSweep: Sweep out Neural Backdoors by GAN. ACM Multimedia 2020"

_PRIOR = Spread(sd=0.25, weight=10)
"""Standard deviation over labels without a backdoor: 0.05 to 0.42, median 0.18, in 16 small networks; rounded up."""

_TRIGGER_SUCCESS = 0.8
"""Success on held-out images from which the mean perturbation passes for a trigger."""


@dataclass(frozen=True, kw_only=True)
class GangSweep(Detector):
    """Labels to which all images get by nearly the same long move in feature space.

    For every label t a small residual network G is trained that makes a mask for each image,

        x' = clip(x + G(x)),  min over G:  α · mean max(max_{j≠t} z_j(x') - z_t(x'), 0) + mean ‖G(x)‖₂,

    with z the logits; α falls once the attack works. With φ what the head is given, Δφ = φ(x') - φ(x) is measured on
    images the generator never saw. The masks of a backdoored label find its trigger, so all images make one and the
    same long move: a small *shift variance*, tr Var(Δφ), and a large *shift distance*, ‖mean Δφ‖. Towards a clean
    label every class needs a move of its own.

    The decision is the p-value of the smallest ln(variance / distance) among the labels, with the spread moderated by
    that of clean networks. Labels for whose images the generator fails are left out of the comparison. More than one
    label can stand out. Of many classes a random selection is examined unless labels are named.

    As the masks depend on the image, the paper also claims polymorphic triggers. It does not see backdoors that
    work from one class only, or send every class to another label: the move then differs between images anyway. In
    networks that average over the whole image before a small head, one move leads to clean labels as well, and it
    finds little. A clean class that lies close to all others comes near a backdoor.
    """

    id = "gangsweep"
    paper = _PAPER
    cost = 30.0
    default = False
    blind_spots = ("all-to-all backdoors", "source-specific backdoors")

    width: int = option(8, help="Channels inside the generator; the original: 16.", minimum=1)
    blocks: int = option(1, help="Residual blocks; the original: 2.", minimum=0)
    steps: int = option(120, help="Gradient steps per label.", minimum=1)
    batch_size: int = option(32, help="Images per gradient step.", minimum=2)
    learning_rate: float = option(2e-3, help="Of Adam.", minimum=1e-6)
    alpha: float = option(0.1, help="Weight of the attack against the masks' norm at the start.", minimum=1e-6)
    alpha_factor: float = option(1.05, help="The weight falls by it while the attack works, else rises.", minimum=1)
    attack_success_threshold: float = option(0.9, help="Success rate from which it works.", minimum=0, maximum=1)
    margin: float = option(0.1, help="Lead of the target's logit, in the network's own margins.", minimum=0)
    held_out_success: float = option(0.6, help="Success on held-out images a label needs to count.", minimum=0)
    most_labels: int = option(32, help="Of more classes, as many random ones, unless labels are named.", minimum=3)

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """One label each."""
        labels: Sequence[int] = range(classifier.num_classes)
        if context.labels is not None:
            labels = context.labels
        elif classifier.num_classes > self.most_labels:
            order = torch.randperm(classifier.num_classes, generator=context.generator(self.id, "labels"))
            labels = sorted(order[: self.most_labels].tolist())
        return [Unit(f"label {label}", (label,)) for label in labels]

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Train the label's generator and measure the shift it causes."""
        if images is None:
            raise MethodError(f"{self.id} needs clean images.", hint="Pass --valid.")
        (target,) = unit.labels
        train, held_out = split_images(images, context)
        victims, random = _others(self.id, train, target), context.generator(self.id, unit.id)
        schedule = self._schedule()
        generator, samples = train_generator(classifier, victims, target, schedule, random, context.progress)
        pixels, labels = to_tensor(held_out.pixels), torch.from_numpy(held_out.labels)
        clean = head_features(classifier, pixels)
        unit_length = clean_spread(clean, labels)
        others = labels != target
        row: dict[str, Any] = {"label": target, "succeeded": False, "classes": classifier.num_classes}
        triggers: list[Trigger] = []
        if others.any():
            pixels, clean = pixels[others], clean[others]
            with torch.no_grad():
                perturbed = torch.cat([generator.perturb(part) for part in pixels.split(256)])
                success = float((logits(classifier, perturbed).argmax(1) == target).double().mean())
            shift = measure_shift(clean, head_features(classifier, perturbed), unit_length)
            masks = perturbed - pixels
            trigger, rate = mean_trigger(classifier, masks.mean(0), pixels, target, _TRIGGER_SUCCESS)
            triggers = [trigger] if rate >= _TRIGGER_SUCCESS else []
            row |= {
                "succeeded": success >= self.held_out_success,
                "success": round(success, 4),
                "shift_distance": round(shift.distance, 5),
                "shift_variance": round(shift.variance, 5),
                "statistic": round(shift.statistic, 5),
                "mask_norm": round(float(masks.flatten(1).norm(dim=1).mean()), 4),
                "persistence": round(persistence(masks), 4),
                "trigger_success": round(rate, 4),
            }
        return Evidence(figures={"labels": [row]}, triggers=triggers, gradient_samples=samples)

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Compare the labels whose generator works."""
        rows: list[dict[str, Any]] = [row for part in evidence for row in part.figures["labels"]]
        triggers = {trigger.target: trigger for part in evidence for trigger in part.triggers}
        found = [row for row in rows if row["succeeded"]]
        classes = max((row["classes"] for row in rows), default=0)
        figures: dict[str, Any] = {"examined": len(rows), "succeeded": len(found), "classes": classes}
        note = f"{len(rows)} of {classes} labels were examined." if len(rows) < classes else ""
        if len(found) < 2:
            reason = "A generator succeeded for fewer than two labels: nothing to compare."
            return Judgement(p_value=None, figures=figures, note=f"{reason} {note}".rstrip())
        values = [float(row["statistic"]) for row in found]
        most = max(1, len(found) // 5)
        outliers = small_outliers(values, tested=len(rows), level=0.01, most=most, prior=_PRIOR)
        figures["z"] = {str(found[i]["label"]): round(z, 3) for i, z in zip(outliers.index, outliers.z, strict=True)}
        findings = []
        for position, p_value in zip(outliers.index, outliers.p_values, strict=True):
            row = found[position]
            trigger = triggers.get(row["label"])
            findings.append(
                Finding(
                    target_label=row["label"],
                    p_value=p_value,
                    score=-float(row["statistic"]),
                    trigger=trigger,
                    attack_success_rate=row["trigger_success"] if trigger else None,
                )
            )
        return Judgement(findings=findings, p_value=outliers.p_values[0], figures=figures, note=note)

    def _schedule(self) -> GeneratorSchedule:
        return GeneratorSchedule(
            width=self.width,
            blocks=self.blocks,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            alpha=self.alpha,
            alpha_factor=self.alpha_factor,
            success=self.attack_success_threshold,
            margin=self.margin,
        )


def _others(method: str, images: LabelledImages, target: int) -> Tensor:
    """The images of all classes but ``target``."""
    others = images.labels != target
    if others.sum() < 2:
        raise MethodError(f"{method} cannot examine label {target}: the clean images hold no other class.")
    return to_tensor(images.pixels[others])


@dataclass(frozen=True, kw_only=True)
class GangSweepRepair(RejectingRepairer):
    """Adds a class N, "this input is backdoored", learnt from what generators make of clean images.

    For every flagged label a generator is trained as for detection. The head grows to N+1 classes, and the network is
    trained on clean images with their labels and on the same with a generator's masks, labelled N: first the new head
    alone, then all layers. It needs the flagged labels, no triggers. The masks are only as strong as the attack needs,
    so they are also shown stronger, up to ``opacity`` times. A further round sweeps the retrained network for what is
    left and starts again with all masks. Where faint masks fool a network anyway, as with colour photographs, they
    hide a part of the trigger, and some attacks go on working: prefer ``retrain`` there.
    """

    id = "gangsweep"
    paper = _PAPER
    needs_triggers = True

    opacity: float = option(2.0, help="Masks are made stronger by up to this factor.", minimum=1, maximum=10)
    rounds: int = option(2, help="Rounds: all but the first sweep the network that the one before made.", minimum=1)
    generator_steps: int = option(200, help="Gradient steps per flagged label's generator.", minimum=1)

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate with N+1 classes."""
        targets = sorted({finding.target_label for finding in findings})
        if not targets:
            raise MethodError(
                f"{self.id} needs to know which labels are suspect, and no finding names one.",
                hint="Scan first and pass its report.",
            )
        schedule = GangSweep(steps=self.generator_steps)._schedule()
        generators: list[MaskGenerator] = []
        repaired, used = classifier, 0
        figures: dict[str, float] = {}

        def poison(clean: Tensor, random: torch.Generator) -> Tensor:
            which = torch.randint(len(generators), (len(clean),), generator=random)
            factors = 1 + (self.opacity - 1) * torch.rand(len(clean), 1, 1, 1, generator=random)
            masks = torch.stack([generator(clean) for generator in generators])
            return (clean + factors * masks[which, torch.arange(len(clean))]).clamp(0, 1)

        for turn in range(self.rounds):
            for target in targets:
                victims, random = _others(self.id, images, target), context.generator(self.id, turn, target)
                generator, samples = train_generator(repaired, victims, target, schedule, random)
                generators.append(generator)
                used += samples
            random = context.generator(self.id, turn, "retrain")
            repaired, figures = self.learn(classifier, images, poison, random, lambda _: None)
            context.progress((turn + 1) / self.rounds)
            used += int(figures["gradient_samples"])
        facts = {"targets": targets, "rounds": self.rounds, "steps": self.head_steps + self.steps, **figures}
        return [Candidate("gangsweep", repaired, facts | {"gradient_samples": used}, rejects=True)]


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    """The detectors of this module."""
    return [GangSweep]


@hookimpl
def backdoorscan_repairers() -> Sequence[type[Repairer]]:
    """The repairers of this module."""
    return [GangSweepRepair]
