"""The GoodNet: a repaired network that may also answer "this input is backdoored"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorscan.classifier import Classifier


def disagreement(original: Tensor, repaired: Tensor) -> Tensor:
    """Scores of a GoodNet from the logits of the network B and of the repaired network B′.

    Where both name the same class the scores are B's probabilities and 0 for the class N; where they differ they
    are 0 for every class and 1 for N. So the largest score is at the answer and each row sums to 1.

    Source: the pruning defense of Liu et al. 2018, "Fine-Pruning", in its N+1 form.

    Args:
        original: Shape (N, K).
        repaired: Shape (N, K).

    Returns:
        Shape (N, K+1).
    """
    agree = (original.argmax(1, keepdim=True) == repaired.argmax(1, keepdim=True)).to(original.dtype)
    return torch.cat([agree * original.softmax(1), 1 - agree], dim=1)


class GoodNet(nn.Module):
    """Images ``(N, C, H, W)`` in [0, 1] -> scores ``(N, K+1)``; the last is "backdoored".

    Args:
        original: The network B.
        repaired: The repaired network B′.
    """

    def __init__(self, original: Classifier, repaired: Classifier) -> None:
        super().__init__()
        self.original = original
        self.repaired = repaired

    @property
    def classifier(self) -> Classifier:
        """The network that says how images are fed."""
        return self.original

    @property
    def num_classes(self) -> int:
        """K: what the last score's index is."""
        return self.original.num_classes

    def from_native(self, inputs: Tensor) -> Tensor:
        """Scores (N, K+1) of inputs in the network's own units."""
        return disagreement(self.original.from_native(inputs), self.repaired.from_native(inputs))

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (N, K+1) of images (N, C, H, W) in [0, 1]."""
        return self.from_native(self.original.native(pixels))


class RejectingNet(nn.Module):
    """A GoodNet in one piece: a network that learned the class "backdoored" beside its own.

    Args:
        classifier: K+1 logits; the last is "backdoored".
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    @property
    def num_classes(self) -> int:
        """K: what the last score's index is."""
        return self.classifier.num_classes - 1

    def from_native(self, inputs: Tensor) -> Tensor:
        """Scores (N, K+1) of inputs in the network's own units; each row sums to 1."""
        return self.classifier.from_native(inputs).softmax(1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (N, K+1) of images (N, C, H, W) in [0, 1]."""
        return self.from_native(self.classifier.native(pixels))
