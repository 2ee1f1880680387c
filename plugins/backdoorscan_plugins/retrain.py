"""N+1 retraining: the network learns a class "this input is backdoored"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorscan import hookimpl
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.ops.rejecting import Poison, RejectSchedule, learn_to_reject, moved
from backdoorscan.ops.stamping import stamp_some
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.trigger import Trigger


@dataclass(frozen=True, kw_only=True)
class RejectingRepairer(Repairer):
    """What repairers share that add a class N, "this input is backdoored"."""

    head_steps: int = option(100, help="Batches for the new head alone.", minimum=0)
    steps: int = option(300, help="Batches for all layers.", minimum=0)
    batch_size: int = option(32, help="Images per batch.", minimum=2)
    head_rate: float = option(0.1, help="Relative step size for the head alone.", minimum=1e-6, maximum=1)
    rate: float = option(0.01, help="Relative step size for all layers.", minimum=1e-6, maximum=1)
    share: float = option(0.3, help="Part of each batch that is poisoned.", minimum=0.01, maximum=0.99)
    opacity: float = option(2.0, help="Masks are made stronger by up to this factor.", minimum=1, maximum=10)
    distillation: float = option(0.7, help="Weight of the original's answers as labels.", minimum=0, maximum=1)
    false_rejects: float = option(0.01, help="Clean images that N may take, a share.", minimum=0, maximum=1)

    def learn(
        self,
        classifier: Classifier,
        images: LabelledImages,
        poison: Poison,
        random: torch.Generator,
        progress: Callable[[float], None],
    ) -> tuple[Classifier, dict[str, float]]:
        """The network with N+1 classes and figures about its making; see ``learn_to_reject``."""
        schedule = RejectSchedule(
            head_steps=self.head_steps,
            steps=self.steps,
            batch_size=self.batch_size,
            head_rate=self.head_rate,
            rate=self.rate,
            share=self.share,
            distillation=self.distillation,
            false_rejects=self.false_rejects,
        )
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        return learn_to_reject(classifier, pixels, labels, poison, schedule, random, progress)


@dataclass(frozen=True, kw_only=True)
class Retrain(RejectingRepairer):
    """Adds a class N, "this input is backdoored", and retrains on clean and poisoned images.

    The head grows to N+1 classes. Clean images keep their labels, poisoned ones get N; first the new head alone is
    trained, then all layers. Poisoned images are the known ones, if there are any, or else clean images stamped with
    the reversed triggers of all flagged labels, made stronger at random, as a reversed trigger is fainter than the
    true one.

    Clean images are moved by a pixel and blended, and their labels are for the larger part what the original network
    answers: so a few hundred of them keep the accuracy. A quarter of them is left out of training and sets the bias
    of N, so that N takes no more clean images than ``false_rejects``.

    It rejects what it has been shown. Another trigger for the same label passes unless it looks alike; a trigger
    reversed poorly teaches little.
    """

    id = "retrain"
    paper = (
        "The repaired network with N+1 classes of Zhu, Ning, Wang, Xin, Wang: GangSweep: Sweep out Neural Backdoors by "
        "GAN. ACM Multimedia 2020, on known or reversed triggers"
    )

    needs_triggers = True
    poisoned = "images"
    auto = ({},)

    jitter: int = option(0, help="Reversed triggers are moved by up to this many pixels.", minimum=0)

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate with N+1 classes."""
        triggers = [finding.trigger for finding in findings if finding.trigger is not None]
        known = context.poisoned
        if known is None and not triggers:
            raise MethodError(
                f"{self.id} needs poisoned images or reversed triggers, and has neither.",
                hint="Pass --poisoned, or scan with neural-cleanse first and pass its report or its --triggers.",
            )
        poison = self._stamped(triggers) if known is None else _drawn(to_tensor(known.pixels))
        repaired, figures = self.learn(classifier, images, poison, context.generator(self.id), context.progress)
        facts = {
            "steps": self.head_steps + self.steps,
            "triggers": len(triggers) if known is None else 0,
            "poisoned_images": 0 if known is None else len(known),
            "targets": sorted({trigger.target for trigger in triggers}) if known is None else [],
            **figures,
        }
        return [Candidate("retrained", repaired, facts, rejects=True)]

    def _stamped(self, triggers: Sequence[Trigger]) -> Poison:
        def poison(clean: Tensor, random: torch.Generator) -> Tensor:
            shifted = [moved(trigger, self.jitter, random) for trigger in triggers] if self.jitter else triggers
            return stamp_some(clean, shifted, len(clean), random, opacity=self.opacity)

        return poison


def _drawn(poisoned: Tensor) -> Poison:
    """Known poisoned images (N, C, H, W), drawn at random."""

    def poison(clean: Tensor, random: torch.Generator) -> Tensor:
        return poisoned[torch.randint(len(poisoned), (len(clean),), generator=random)]

    return poison


@hookimpl
def backdoorscan_repairers() -> Sequence[type[Repairer]]:
    """The methods of this module."""
    return [Retrain]
