"""Accuracy and attack success, with the definitions every report uses."""

from __future__ import annotations

from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The part of ``predictions`` (N,) that equal ``labels`` (N,), 0 to 1."""
    return float((predictions == labels).double().mean())


def attack_success_rate(predictions: Tensor, labels: Tensor, target: int) -> float | None:
    """The part of stamped images that are given the target label.

    Images that belong to the target class anyway are left out: for them nothing would have to succeed.

    Args:
        predictions: Shape (N,), for the stamped images.
        labels: Shape (N,), the images' true labels.
        target: The target label.

    Returns:
        0 to 1, or ``None`` if all images belong to the target class.
    """
    others = labels != target
    return accuracy(predictions[others], predictions[others].new_full((), target)) if bool(others.any()) else None
