"""How far each class lies from everything else, in the space of the features that the head is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backdoorscan.ops.outliers import MAD_TO_SD


def step_lengths(weights: Tensor, bias: Tensor, features: Tensor, parts: Sequence[float]) -> Tensor:
    """How far features must move along a class's own direction until it overtakes each other class on most images.

    A backdoor builds a short way into its target: its trigger has to move any image's features there. The way is
    measured along u_k, the direction in which class k gains on the average class, without negative components where
    features have none (after a ReLU nothing can be taken away that is not there):

        s_k = max_j Q_i(z_ij - z_ik) / ((w_k - w_j)·u_k),

    with z the logits and Q the quantile over the images i. A closed form of the smallest latent perturbation that
    studies of latent backdoors search by quadratic programming, for all classes at once.

    Args:
        weights: Shape (K, D), of the head.
        bias: Shape (K,).
        features: Shape (N, D), what the head is given for N images.
        parts: P quantiles: each other class is overtaken on this part of the images, 0 to 1. All are on fewer.

    Returns:
        Shape (P, K), in units of the features; infinite where the direction does not lead into the class.
    """
    ways = weights - weights.mean(0)
    if bool((features >= 0).all()):
        ways = ways.clamp(min=0)
    ways = ways / ways.norm(dim=1, keepdim=True).clamp_min(1e-12)
    logits = (features @ weights.T + bias).T.contiguous()
    places = [int(part * (len(features) - 1)) for part in parts]
    gains = ways @ weights.T
    gains = gains.diagonal()[:, None] - gains
    lengths = []
    for label, gain in enumerate(gains):
        leads = (logits - logits[label]).numpy()
        leads.sort(axis=1)  # one for all quantiles, and faster than torch's kthvalue
        length = torch.where(gain > 0, torch.from_numpy(leads[:, places]).T / gain.clamp_min(1e-12), torch.inf)
        length[:, label] = 0
        lengths.append(length.amax(1).clamp_min(0))
    return torch.stack(lengths, 1)


def row_evidence(weights: Tensor, bias: Tensor) -> Tensor:
    """How unusual each class's output weights are, from the weights alone.

    The sum of a class's weights and its bias, each in robust deviations above the median class; the larger counts. A
    trigger that excites many neurons, or whose class is a default answer, leaves its mark there.

    Args:
        weights: Shape (K, D), of the head.
        bias: Shape (K,).

    Returns:
        Shape (K,); 3 is unusual among ten classes, 5 among a thousand.
    """
    return torch.maximum(_deviations(weights.sum(1)), _deviations(bias))


def _deviations(values: Tensor) -> Tensor:
    away = values - values.median()
    return away / (MAD_TO_SD * away.abs().median()).clamp_min(1e-12)
