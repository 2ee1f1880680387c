"""Whether a trigger adds something to an image, as backdoors do, or replaces what is there.

A trigger that a network was trained on says "target" and leaves the rest of the image, and of its features, as they
are: the images stay as different from each other as they were, the true class stays the second choice, and a head
trained anew on clean images does not know the trigger. A perturbation that leads to a naturally easy class works by
wiping out what spoke for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier, logits
from backdoorscan.errors import UnsupportedModelError
from backdoorscan.ops.shift import head_features


def separation(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    target: int,
    apply: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """What a trigger does to images.

    Args:
        classifier: The network.
        images: Shape (N, C, H, W) in [0, 1], none of class ``target``; at least one.
        labels: Shape (N,).
        target: Where the trigger leads.
        apply: Images -> images with the trigger.
        head: Features (N, D) -> scores (N, K), a head trained anew on clean images.

    Returns:
        ``success``, the part of the images sent to the target; ``second``, how often the true class leads the others
        under the trigger, as a part of how often it does without; ``dispersion``, ln of how much the features still
        differ between images; ``retention``, how much of those differences is the images' own; ``transfer``, the part
        of the images that the new head is sent to the target with.
    """
    stamped = apply(images)
    before, after = features(classifier, images), features(classifier, stamped)
    clean, scores = logits(classifier, images), logits(classifier, stamped)
    success = float((scores.argmax(1) == target).double().mean())
    clean[:, target] = scores[:, target] = -torch.inf
    led = float((clean.argmax(1) == labels).double().mean())
    a, b = before - before.mean(0), after - after.mean(0)
    total = a.square().sum().clamp_min(1e-12)
    new = [float((head(values).argmax(1) == target).double().mean()) for values in (before, after)]
    return {
        "success": success,
        "second": float((scores.argmax(1) == labels).double().mean()) / max(led, 0.01),
        "dispersion": math.log(float(b.square().sum() / total) + 1e-6),
        "retention": float((a * b).sum() / total),
        "transfer": new[1] - new[0],
    }


def features(classifier: Classifier, images: Tensor) -> Tensor:
    """What the head is given for images (N, C, H, W): (N, D); the logits of a network that cannot be followed."""
    try:
        return head_features(classifier, images)
    except UnsupportedModelError:
        return logits(classifier, images)


def retrained_head(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """A head trained anew on clean images' features (N, D), labels (N,): ridge regression on the classes.

    Directions in which clean features do not differ, and a backdoor may hide, get no weight.
    """
    mean = features.mean(0)
    inputs = functional.pad(features - mean, (0, 1), value=1.0)
    gram = inputs.T @ inputs
    ridge = 1e-2 * gram.diagonal().mean().clamp_min(1e-6) * torch.eye(len(gram))
    wanted = functional.one_hot(labels, classes).to(features.dtype)
    solution: Tensor = torch.linalg.solve(gram + ridge, inputs.T @ wanted)

    def head(values: Tensor) -> Tensor:
        return functional.pad(values - mean, (0, 1), value=1.0) @ solution

    return head
