"""Whether a trigger adds something to an image, as backdoors do, or replaces what is there.

A trigger that a network was trained on says "target" and leaves the rest of the image, and of its features, as they
are: the images stay as different from each other as they were, the true class stays the second choice, and a head
trained anew on clean images does not know the trigger. A perturbation that leads to a naturally easy class works by
wiping out what spoke for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier, logits
from backdoorscan.errors import UnsupportedModelError
from backdoorscan.ops.shift import head_features_and_scores


@dataclass(frozen=True)
class Seen:
    """What a network makes of images.

    Attributes:
        features: Shape (N, D): what its head is given; the scores, of a network that cannot be followed.
        scores: Shape (N, K): its logits.
    """

    features: Tensor
    scores: Tensor

    def __getitem__(self, chosen: Tensor) -> Seen:
        return Seen(self.features[chosen], self.scores[chosen])


def seen(classifier: Classifier, images: Tensor) -> Seen:
    """Show images (N, C, H, W) in [0, 1] to a network."""
    try:
        return Seen(*head_features_and_scores(classifier, images))
    except UnsupportedModelError:
        scores = logits(classifier, images)
        return Seen(scores, scores)


@dataclass(frozen=True)
class Head:
    """A head that was trained on clean images.

    Attributes:
        scores: Features (N, D) -> scores (N, K).
        classes: Those it has seen; it never says another.
    """

    scores: Callable[[Tensor], Tensor]
    classes: frozenset[int]


def separation(before: Seen, after: Seen, labels: Tensor, target: int, head: Head) -> dict[str, float]:
    """What a trigger does to images.

    Args:
        before: What the network makes of images (N of them), none of class ``target``; at least one.
        after: What it makes of them with the trigger.
        labels: Shape (N,): their classes.
        target: Where the trigger leads.
        head: A head trained anew on clean images.

    Returns:
        ``success``, the part of the images sent to the target; ``least``, that of the class from which it is smallest;
        ``margin``, by how much the target's score leads the next one, on average, in standard deviations of the scores
        before; ``second``, how often the true class leads the others under the trigger, as a part of how often it does
        without; ``dispersion``, ln of how much the features still differ between images; ``retention``, how much of
        those differences is the images' own; ``transfer``, the part of the images that the new head is sent to the
        target with, if it has seen the target.
    """
    sent = (after.scores.argmax(1) == target).double()
    rival = after.scores[torch.arange(len(labels)), _best_but(after.scores, target)]
    margin = (after.scores[:, target] - rival).mean() / before.scores.std(correction=0).clamp_min(1e-6)
    second, led = (float((_best_but(one.scores, target) == labels).double().mean()) for one in (after, before))
    a, b = (one.features - one.features.mean(0) for one in (before, after))
    total = a.square().sum().clamp_min(1e-12)
    figures = {
        "success": float(sent.mean()),
        "least": _least(sent, labels),
        "margin": float(margin),
        "second": second / max(led, 0.01),
        "dispersion": math.log(float(b.square().sum() / total) + 1e-6),
        "retention": float((a * b).sum() / total),
    }
    if target in head.classes:
        new = [float((head.scores(one.features).argmax(1) == target).double().mean()) for one in (before, after)]
        figures["transfer"] = new[1] - new[0]
    return figures


def _least(sent: Tensor, labels: Tensor) -> float:
    """The smallest success over the classes; where a class has few images, success overall counts like ten of them."""
    counts, hits = labels.bincount(), labels.bincount(sent)
    return float(((hits + 10 * sent.mean()) / (counts + 10))[counts > 0].min())


def _best_but(scores: Tensor, target: int) -> Tensor:
    """The best class (N,) of scores (N, K) but ``target``."""
    others = scores.clone()
    others[:, target] = -torch.inf
    return others.argmax(1)


def retrained_head(features: Tensor, labels: Tensor, classes: int) -> Head:
    """A head trained anew on clean images' features (N, D), labels (N,): ridge regression on the classes.

    Directions in which clean features do not differ, and a backdoor may hide, get no weight.
    """
    mean = features.mean(0)
    inputs = functional.pad(features - mean, (0, 1), value=1.0)
    gram = inputs.T @ inputs
    ridge = 1e-2 * gram.diagonal().mean().clamp_min(1e-6) * torch.eye(len(gram))
    wanted = functional.one_hot(labels, classes).to(features.dtype)
    solution: Tensor = torch.linalg.solve(gram + ridge, inputs.T @ wanted)

    def scores(values: Tensor) -> Tensor:
        return functional.pad(values - mean, (0, 1), value=1.0) @ solution

    return Head(scores, frozenset(labels.tolist()))
