"""Accuracy, precision and attack success, with the definitions every report uses."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The part of ``predictions`` (N,) that equal ``labels`` (N,), 0 to 1."""
    return float((predictions == labels).double().mean())


def macro_precision(predictions: Tensor, labels: Tensor, rejects: int | None = None) -> float:
    """The mean over the classes of the part of the images given a class that belong to it.

    It counts the classes that occur among the labels or the predictions, each alike; one that no image is given has
    precision 0. That is scikit-learn's ``precision_score(average="macro", zero_division=0)``. The answer "backdoored"
    of a GoodNet is no class: images that get it count for no class's precision.

    Args:
        predictions: Shape (N,).
        labels: Shape (N,).
        rejects: The answer that says "backdoored", if there is one; no label.

    Returns:
        0 to 1.
    """
    present = torch.cat((predictions, labels)).unique()
    present = present[present != rejects] if rejects is not None else present
    length = int(present.max()) + 1
    given = predictions.bincount(minlength=length)[present]
    right = predictions[predictions == labels].bincount(minlength=length)[present]
    return float((right.double() / given.clamp(min=1)).mean())


def attack_counts(predictions: Tensor, labels: Tensor, target: int) -> tuple[int, int]:
    """How many stamped images are given the target label, and how many are not.

    Images that belong to the target class anyway are left out: for them nothing would have to succeed.

    Args:
        predictions: Shape (N,), for the stamped images.
        labels: Shape (N,), the images' true labels.
        target: The target label.
    """
    attacked = predictions[labels != target]
    successful = int((attacked == target).sum())
    return successful, len(attacked) - successful


def attack_success_rate(predictions: Tensor, labels: Tensor, target: int) -> float | None:
    """The part of stamped images that are given the target label, counted as ``attack_counts`` does.

    Args:
        predictions: Shape (N,), for the stamped images.
        labels: Shape (N,), the images' true labels.
        target: The target label.

    Returns:
        0 to 1, or ``None`` if all images belong to the target class.
    """
    successful, unsuccessful = attack_counts(predictions, labels, target)
    return successful / (successful + unsuccessful) if successful + unsuccessful else None
