"""The contract of a detection method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.findings import Evidence, Judgement, Unit
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context, Method
from backdoorscan.trigger import Trigger

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Detector(Method, ABC):
    """Looks for backdoors in a classifier.

    The engine owns the loop: it runs ``examine`` once per unit, wherever and in whatever order it likes, and
    hands all evidence to ``judge``. A detector never sees ground truth, never prints, and never chooses the device
    or the seed.

    Attributes:
        needs_images: Whether it can work only with clean images.
        cost: Rough order of cost; a scan runs cheap detectors first.
        default: Whether a scan runs it when the user names none.
        blind_spots: What it cannot see; reports say so unless another detector that ran covers it.
        covers: Blind spots of other detectors that it does see.
        confirms: Ids of detectors whose suspicions it examines again: where it has an answer, theirs does not count.
        share: Its part of the budget of false alarms, beside those of the others that have an answer. Detectors of
            special kinds, or with p-values that leave no doubt, need little.
    """

    needs_images: ClassVar[bool] = True
    cost: ClassVar[float] = 1.0
    default: ClassVar[bool] = True
    blind_spots: ClassVar[Sequence[str]] = ()
    covers: ClassVar[Sequence[str]] = ()
    confirms: ClassVar[Sequence[str]] = ()
    share: ClassVar[float] = 1.0

    def units(self, classifier: Classifier, context: Context) -> Sequence[Unit]:
        """The pieces of work; one, unless the method says otherwise."""
        return [Unit("all", examined_labels(classifier, context))]

    @abstractmethod
    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        """Do one piece of work. This is where the time goes.

        Raises:
            MethodError: The method cannot work on this model.
        """

    def more_units(self, evidence: Sequence[Evidence], classifier: Classifier, context: Context) -> Sequence[Unit]:
        """Further work, asked for after every round with all evidence so far; none ends it."""
        return ()

    @abstractmethod
    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        """Draw the conclusion. Pure and cheap: stored evidence can be judged again."""


def run_detector(
    detector: Detector, classifier: Classifier, images: LabelledImages | None, context: Context
) -> tuple[list[Evidence], Judgement]:
    """All rounds of a detector's work, and what it makes of them."""
    evidence: list[Evidence] = []
    units = detector.units(classifier, context)
    while units:
        evidence += [detector.examine(unit, classifier, images, context) for unit in units]
        units = detector.more_units(evidence, classifier, context)
    return evidence, detector.judge(evidence)


MANY_CLASSES = 64
"""Number of classes above which looking closely at each would take too long."""


def examined_labels(classifier: Classifier, context: Context) -> tuple[int, ...]:
    """The labels to examine: the user's restriction, or all of them."""
    return context.labels if context.labels is not None else tuple(range(classifier.num_classes))


def shortlist(classifier: Classifier, context: Context, most: int, random: int) -> tuple[int, ...]:
    """Of many classes those that earlier detectors rank first, and random ones beside them.

    Args:
        classifier: Tells the number of classes.
        context: Its ``earlier`` holds the rankings, which are drawn from in turn.
        most: How many to take from the rankings.
        random: How many others.

    Returns:
        All labels, or the user's, where they are not many or no earlier detector ranks them.
    """
    labels = examined_labels(classifier, context)
    rankings = [examined.judgement.ranking for examined in context.earlier.values() if examined.judgement.ranking]
    if len(labels) <= MANY_CLASSES or not rankings:
        return labels
    allowed = set(labels)
    in_turn = (label for place in zip(*rankings, strict=False) for label in place if label in allowed)
    chosen = list(dict.fromkeys(in_turn))[:most]
    order = torch.randperm(len(labels), generator=context.generator("random labels")).tolist()
    others = [labels[i] for i in order if labels[i] not in set(chosen)]
    return (*chosen, *others[:random])


def heats(
    number: int,
    labels: Sequence[int],
    starts: Sequence[Trigger] = (),
    sources: Sequence[int] = (),
    *,
    at_a_time: int = 8,
) -> list[Unit]:
    """A round of a race, in units of a few labels.

    Args:
        number: The round, from 1.
        labels: The labels still in it.
        starts: Where each goes on from; none in the first round.
        sources: The class each works from; none for all.
        at_a_time: Labels in one unit.
    """

    def part(values: Sequence[T], place: int) -> tuple[T, ...]:
        return tuple(values[place : place + at_a_time])

    return [
        Unit(
            id=f"round {number}, from place {place + 1}",
            labels=part(labels, place),
            round=number,
            sources=part(sources, place),
            starts=part(starts, place),
        )
        for place in range(0, len(labels), at_a_time)
    ]


def last_round(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """The rows (``figures["labels"]``) of the last round."""
    rows: list[dict[str, Any]] = [row for part in evidence for row in part.figures["labels"]]
    last = max((row["round"] for row in rows), default=0)
    return [row for row in rows if row["round"] == last]


def split_images(images: LabelledImages, context: Context) -> tuple[LabelledImages, LabelledImages]:
    """Images to search with and images to test with; the same where there are too few for both."""
    if len(images) < 20:
        return images, images
    order = torch.randperm(len(images), generator=context.generator("split", images.sha256)).numpy()
    held_out = min(math.ceil(len(images) / 3), 500)
    return images.take(order[held_out:]), images.take(order[:held_out])


def labels_to_check(num_classes: int, targets: Sequence[int], context: Context) -> tuple[int, ...]:
    """The labels to look at after a repair: all, or of many the repaired ones and sixteen random ones beside them."""
    if num_classes <= MANY_CLASSES:
        return tuple(range(num_classes))
    order = torch.randperm(num_classes, generator=context.generator("labels to check")).tolist()
    others = [label for label in order if label not in targets][:16]
    return tuple(sorted({*targets, *others}))


def recognised(classifier: Classifier, images: LabelledImages) -> LabelledImages:
    """The images whose class the classifier tells right, or all: others do not show what a trigger does."""
    right = logits(classifier, to_tensor(images.pixels)).argmax(1).numpy() == images.labels
    return images.take(np.flatnonzero(right)) if right.any() else images
