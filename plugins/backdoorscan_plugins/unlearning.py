"""The two mitigations of Neural Cleanse: unlearning reversed triggers, and pruning the neurons they use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from backdoorscan import graph, hookimpl
from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import accuracy
from backdoorscan.ops.stamping import stamp_some
from backdoorscan.ops.training import fine_tune, moved, shuffled, vary
from backdoorscan.plugin.detector import labels_to_check, run_detector
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.trigger import Trigger
from backdoorscan_plugins.neural_cleanse import NeuralCleanse

DEFAULT_LEVEL = 0.01
"""p-value at which a label counts as flagged between rounds."""

_PAPER = (
    "Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: Identifying and Mitigating Backdoor Attacks in "
    "Neural Networks. IEEE S&P 2019, section VI"
)


@dataclass(frozen=True, kw_only=True)
class Unlearn(Repairer):
    """Fine-tunes on images that carry the reversed triggers and keep their true labels.

    A share of every batch is stamped with the reversed triggers of all flagged labels. One round is the paper's: one
    epoch over a sample of a tenth of the training set (images drawn again are moved by a pixel). After it the
    triggers are reversed again on the repaired network and a second round unlearns the old and the new ones together:
    what the first left over shows in the new ones. A third follows while a label is still flagged, or the old
    triggers at twice their strength still work on some images (a reversed trigger is fainter than the true one).

    With ``labels=soft`` the network learns, in place of the true labels, what the original network says about the same
    image without the trigger, on images moved by a pixel and blended. That costs less accuracy where clean images
    are few.

    Known poisoned images with their true labels are mixed in where there are any: they are the images that carry a
    trigger, or half of those where findings carry reversed triggers as well. Without reversed triggers nothing is
    reversed again, and the rounds end when the attack is forgotten.
    """

    id = "unlearn"
    paper = _PAPER
    needs_triggers = True
    poisoned = "true labels"
    auto = ({"labels": "soft", "opacity": 2.0, "rounds": 2, "sample": 8000},)

    epochs: int = option(1, help="Epochs per round.", minimum=1)
    sample: int = option(6000, help="Images per epoch, drawn again if there are fewer; the paper: 10 %.", minimum=1)
    ratio: float = option(0.2, help="Share of the images that carry a trigger.", minimum=0.01, maximum=1)
    rounds: int = option(3, help="Most rounds of unlearning and reversing again.", minimum=1)
    batch_size: int = option(32, help="Images per step.", minimum=2)
    rate: float = option(0.01, help="Size of a step relative to the size of the weights.", minimum=1e-6, maximum=1)
    opacity: float = option(1.0, help="Masks are made stronger by up to this factor.", minimum=1, maximum=10)
    left_over: float = option(
        0.02, help="Success of the old triggers, doubled, and of known attacks that ends it.", minimum=0, maximum=1
    )
    labels: Literal["true", "soft"] = option("true", help="Learn the true labels, or the original's probabilities.")

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate."""
        attacks = _attacks(classifier, context.poisoned)
        triggers = reversed_triggers(self.id, findings) if attacks is None else _carried(findings)
        targets = sorted({trigger.target for trigger in triggers})
        repaired = classifier.clone()
        steps = max(1, self.epochs * self.sample // self.batch_size)
        used = done = 0
        for done in range(1, self.rounds + 1):
            generator = context.generator(self.id, done)
            batches = self._batches(classifier, images, triggers, context.poisoned, generator)
            rate = self.rate if done == 1 else self.rate / 2
            used += fine_tune(repaired, batches, steps, rate, progress=context.progress)
            if done == self.rounds:
                break
            again: list[Trigger] = []
            flagged = False
            if triggers:
                again, flagged, samples = _reverse_again(
                    repaired, images, targets, replace(context, seed=context.seed + done)
                )
                used += samples
            # New triggers are unlearned once before anything is taken for forgotten.
            forgotten = not flagged and (done > 1 or not triggers)
            if forgotten and _left_over(classifier, repaired, images, triggers, attacks) <= self.left_over:
                break
            triggers = [*triggers, *again]
        facts = {
            "rounds": done,
            "triggers": len(triggers),
            "poisoned_images": 0 if context.poisoned is None else len(context.poisoned),
            "targets": targets,
            "gradient_samples": used,
        }
        return [Candidate("unlearned", repaired, facts)]

    def _batches(
        self,
        original: Classifier,
        images: LabelledImages,
        triggers: Sequence[Trigger],
        poisoned: LabelledImages | None,
        generator: torch.Generator,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        for index in shuffled(len(pixels), self.batch_size, generator):
            if self.labels == "soft":
                batch = vary(pixels[index], generator)
                with torch.no_grad():
                    targets = original(batch).softmax(1)
            else:
                batch, targets = moved(pixels[index], generator), labels[index]
            known = 0
            count = max(1, round(self.ratio * len(batch)))
            if poisoned is not None:
                known = (count + 1) // 2 if triggers else count
                drawn = torch.randint(len(poisoned), (known,), generator=generator).numpy()
                true = torch.from_numpy(poisoned.labels[drawn])
                if self.labels == "soft":
                    true = one_hot(true, original.num_classes).to(targets.dtype)
                batch = torch.cat((batch[: len(batch) - known], to_tensor(poisoned.pixels[drawn])))
                targets = torch.cat((targets[: len(batch) - known], true))
            if count > known:
                batch = stamp_some(batch, triggers, count - known, generator, opacity=self.opacity)
            yield batch, targets


@dataclass(frozen=True, kw_only=True)
class NeuronPruning(Repairer):
    """Removes the neurons before the head that a reversed trigger excites and clean images do not.

    The neurons of the layer before the head are ranked by the gap of their mean activation between stamped and clean
    images, and removed one after the other until the reversed triggers succeed on no more than ``success`` of the
    images, or the clean accuracy has dropped by ``budget`` points. It needs no training; where the backdoor shares its
    neurons with clean classes it costs much accuracy.
    """

    id = "nc-prune"
    paper = _PAPER
    needs_triggers = True
    auto = ({},)

    success: float = option(0.05, help="Success of the reversed triggers at which to stop.", minimum=0, maximum=1)
    budget: float = option(5.0, help="Largest drop of the clean accuracy, in points.", minimum=0, maximum=100)

    @torch.no_grad()
    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate."""
        triggers = reversed_triggers(self.id, findings)
        repaired = classifier.clone()
        network = repaired.graph_module
        node = graph.head_node(network)
        head = graph.layer(network, node)
        if not isinstance(head, torch.nn.Linear):
            raise MethodError(f"{self.id} needs a network that ends in a dense layer.", hint="Use --method unlearn.")
        front, rest = graph.split(network, node.all_input_nodes[0])
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        clean = _features(repaired, front, pixels)
        stamped = [(trigger.target, _features(repaired, front, trigger.stamp(pixels))) for trigger in triggers]
        gaps = torch.stack([(part[0] - clean[0]).flatten(1).mean(0) for _, part in stamped]).amax(0)
        if gaps.numel() != head.in_features:
            raise MethodError(f"{self.id} cannot tell the neurons before {node.target} apart.")

        def scores(values: Sequence[Tensor]) -> Tensor:
            return repaired.class_scores(rest(*values)).argmax(1)

        base = accuracy(scores(clean), labels)
        removed = 0
        for removed, neuron in enumerate(gaps.argsort(descending=True).tolist(), start=1):
            column = head.weight[:, neuron].clone()
            head.weight[:, neuron] = 0
            context.progress(removed / head.in_features)
            if 100 * (base - accuracy(scores(clean), labels)) > self.budget:
                head.weight[:, neuron] = column
                removed -= 1
                break
            rates = [accuracy(scores(part)[labels != t], torch.tensor(t)) for t, part in stamped]
            if max(rates) <= self.success:
                break
        facts = {"layer": str(node.target), "channels": head.in_features, "channels_pruned": removed}
        return [Candidate("pruned", repaired, facts)]


def reversed_triggers(method: str, findings: Sequence[Finding]) -> list[Trigger]:
    """The reversed triggers that findings carry.

    Raises:
        MethodError: None does.
    """
    triggers = _carried(findings)
    if not triggers:
        raise MethodError(
            f"{method} needs reversed triggers, and no finding carries one.",
            hint="Scan with neural-cleanse first, or pass --triggers.",
        )
    return triggers


def _carried(findings: Sequence[Finding]) -> list[Trigger]:
    return [finding.trigger for finding in findings if finding.trigger is not None]


def _attacks(classifier: Classifier, poisoned: LabelledImages | None) -> tuple[Tensor, Tensor] | None:
    """The known images (N, C, H, W) that the network gets wrong, and the classes (N,) it is led to.

    Raises:
        MethodError: The labels are those that the attack leads to, or the attack does not work.
    """
    if poisoned is None:
        return None
    pixels, labels = to_tensor(poisoned.pixels), torch.from_numpy(poisoned.labels)
    answers = logits(classifier, pixels).argmax(1)
    wrong = answers != labels
    # Learning the target label for poisoned images would plant the backdoor anew.
    one_label = len(labels.unique()) == 1 and int(answers.mode().values) == int(labels[0])
    if one_label or not bool(wrong.any()):
        raise MethodError(
            f"The labels of {poisoned.source} are what the network answers.",
            why="To unlearn a trigger, images that carry it are needed with the labels they would have without it.",
            hint="Pass images with their true labels and --target, or leave out --learn-from-poisoned.",
        )
    return pixels[wrong], answers[wrong]


def _reverse_again(
    classifier: Classifier, images: LabelledImages, targets: Sequence[int], context: Context
) -> tuple[list[Trigger], bool, int]:
    """Triggers of the repaired labels and of labels that stand out now, whether any does, and gradient samples."""
    method = NeuralCleanse()
    labels = labels_to_check(classifier.num_classes, targets, context)
    watched = replace(context, labels=labels)
    evidence, judgement = run_detector(method, classifier, images, watched)
    rows = {row["label"]: row for part in evidence for row in part.figures["labels"]}
    works = {label for label, row in rows.items() if row["succeeded"]}
    flagged = {finding.target_label for finding in judgement.findings if finding.p_value <= DEFAULT_LEVEL}
    wanted = works & (flagged | set(targets))
    latest = {trigger.target: trigger for part in evidence for trigger in part.triggers}
    triggers = [trigger for label, trigger in latest.items() if label in wanted]
    return triggers, bool(flagged), sum(part.gradient_samples for part in evidence)


@torch.no_grad()
def _left_over(
    original: Classifier,
    repaired: Classifier,
    images: LabelledImages,
    triggers: Sequence[Trigger],
    attacks: tuple[Tensor, Tensor] | None,
) -> float:
    """The largest success of the triggers, at twice their strength, and of the known attacks.

    Of a trigger: on how many more images it succeeds than its target is seen in without it.
    """
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    rates = []
    for trigger in triggers:
        others = pixels[labels != trigger.target]
        doubled = Trigger((2 * trigger.mask).clamp(max=1), trigger.pattern, trigger.target)
        hits = (logits(repaired, doubled.stamp(others)).argmax(1) == trigger.target).double().mean()
        natural = (logits(original, others).argmax(1) == trigger.target).double().mean()
        rates.append(float(hits - natural))
    if attacks is not None:
        victims, answers = attacks
        rates.append(accuracy(logits(repaired, victims).argmax(1), answers))
    return max(rates)


def _features(classifier: Classifier, front: torch.nn.Module, pixels: Tensor) -> list[Tensor]:
    parts = [front(classifier.native(batch)) for batch in pixels.split(512)]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


@hookimpl
def backdoorscan_repairers() -> Sequence[type[Repairer]]:
    """The methods of this module."""
    return [Unlearn, NeuronPruning]
