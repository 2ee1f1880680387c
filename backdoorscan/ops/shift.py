"""Where perturbations move images in feature space, and what they have in common.

Source: Zhu, Ning, Wang, Xin, Wang 2020, "GangSweep: Sweep out Neural Backdoors by GAN". With φ what a network's head
is given, a perturbation x' = clip(x + mask) moves an image by Δφ = φ(x') - φ(x). On a backdoored label all images make
nearly the same move, that of the trigger; towards a clean label each class needs a move of its own. So on a backdoored
label the shift variance tr Cov(Δφ) is low and the shift distance ‖mean Δφ‖ is long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorscan import graph
from backdoorscan.classifier import Classifier, here, logits
from backdoorscan.ops.metrics import attack_success_rate
from backdoorscan.trigger import Trigger


@dataclass(frozen=True)
class Shift:
    """How a perturbation moves images in feature space.

    Attributes:
        distance: ‖mean Δφ‖, in units of the clean spread within classes.
        variance: Trace of the covariance of Δφ, in squared units.
    """

    distance: float
    variance: float

    @property
    def statistic(self) -> float:
        """ln(variance / distance): small where all images make one and the same long move."""
        return math.log(max(self.variance, 1e-12) / max(self.distance, 1e-6))


def measure_shift(before: Tensor, after: Tensor, unit: float) -> Shift:
    """The shift of features: of clean images (N, D), of the same images perturbed (N, D), and the length of a unit."""
    moves = (after - before).double() / unit
    variance = float(moves.var(0, correction=0).sum())
    return Shift(distance=float(moves.mean(0).norm()), variance=variance)


def clean_spread(features: Tensor, labels: Tensor) -> float:
    """Root of the mean squared distance of features (N, D) from the mean of their class, labels (N,); above 0."""
    parts = [features[labels == label].double() for label in labels.unique()]
    total = sum(float((part - part.mean(0)).square().sum()) for part in parts)
    return max(math.sqrt(total / len(features)), 1e-6)


def head_features(classifier: Classifier, images: Tensor) -> Tensor:
    """What the head is given for images (N, C, H, W) in [0, 1]: (N, D), averaged over the place for a convolution.

    Raises:
        UnsupportedModelError: The network cannot be followed.
    """
    return head_features_and_scores(classifier, images)[0]


@torch.no_grad()
def head_features_and_scores(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """What ``head_features`` returns, and the logits (N, K) with it.

    Raises:
        UnsupportedModelError: The network cannot be followed.
    """
    network = classifier.graph_module
    front, rest = graph.split(network, graph.head_node(network).all_input_nodes[0])
    features, scores = [], []
    for part in images.split(256):
        values = front(classifier.native(part))
        first = here(values[0])
        features.append(first.mean((2, 3)) if first.ndim == 4 else first.flatten(1))
        scores.append(classifier.class_scores(rest(*values)))
    return torch.cat(features), torch.cat(scores)


def persistence(masks: Tensor) -> float:
    """How much of the masks (N, C, H, W) is the same for all images: ‖mean mask‖² / mean ‖mask‖², 0 to 1."""
    return float(masks.mean(0).square().sum() / masks.flatten(1).square().sum(1).mean().clamp_min(1e-12))


def mean_trigger(
    classifier: Classifier, mean: Tensor, pixels: Tensor, target: int, enough: float
) -> tuple[Trigger, float]:
    """The trigger that does what the mean mask (C, H, W) does, made up to four times stronger until it works.

    The mask is the largest absolute change over the channels; the pattern lies as far from mid-grey as the changes
    are from each other, so that a change upwards replaces a pixel by white.

    Args:
        classifier: The network.
        mean: The mean mask.
        pixels: Images (N, C, H, W) of other classes than ``target``.
        target: The label.
        enough: The success from which it works, 0 to 1.

    Returns:
        The trigger and its success on ``pixels``.
    """
    size = mean.abs().amax(0, keepdim=True)
    pattern = (0.5 + 0.5 * mean / size.clamp_min(1e-6)).clamp(0, 1)
    labels = torch.full((len(pixels),), -1)
    best, best_rate = Trigger(size.clamp(0, 1), pattern, target), -1.0
    for factor in (1.0, 1.5, 2.0, 3.0, 4.0):
        trigger = Trigger((factor * size).clamp(0, 1), pattern, target)
        rate = attack_success_rate(logits(classifier, trigger.stamp(pixels)).argmax(1), labels, target) or 0.0
        if rate > best_rate:
            best, best_rate = trigger, rate
        if rate >= enough:
            break
    return best, best_rate
