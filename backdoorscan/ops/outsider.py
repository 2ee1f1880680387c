"""What a classifier that knows nothing but clean images makes of a trigger.

What leads images to a class by nature, a stroke that makes a 3 an 8, leads other classifiers there as well, however
they work. What an attacker taught one network means nothing to them. So a trigger is shown to an outsider: kernel ridge
regression on the pixels of the clean images, learned in a fraction of a second and without gradients.

Source: that natural triggers carry over to networks trained anew and planted ones do not, is the observation of
NeuralSanitizer (IEEE TIFS 2024); the classifier is that of Saunders, Gammerman, Vovk 1998, "Ridge Regression Learning
Algorithm in Dual Variables", with a Gaussian kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_FEWEST, _MOST = 100, 1000
"""Images to learn from: fewer say too little, more take long and say nothing new."""

_CLASSES = 16
"""Of more classes each has a smaller share of the images and of the scores' spread: the figure means something else."""

_JUDGED = 200
"""Images on which a trigger is judged."""

_SIDE = 32
"""Larger images are shrunk to as many pixels: what makes a class can be seen in them."""

_RIDGE = 0.1


@dataclass(frozen=True)
class Outsider:
    """A classifier that was learned from clean images.

    Attributes:
        known: Shape (M, D): the images it knows, as it sees them.
        weights: Shape (M, K).
        width: Squared distance over which its kernel falls to 1/e.
        classes: The classes it knows; none, if there were too few images to learn from, or too many classes.
    """

    known: Tensor
    weights: Tensor
    width: float
    classes: frozenset[int]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> scores (N, K), about 1 for the class and 0 for the others."""
        return _kernel(_looked_at(images), self.known, self.width) @ self.weights

    def natural(self, images: Tensor, stamped: Tensor, target: int) -> dict[str, float]:
        """How natural it is that a trigger leads to a class.

        Args:
            images: Shape (N, C, H, W) in [0, 1], none of class ``target``; at least one. Some hundred are looked at.
            stamped: The same images with the trigger.
            target: The class that the trigger leads the network to.

        Returns:
            ``natural``: by how much the mean score of the target rises more than that of any other class (or less:
            below 0), in standard deviations of the scores without the trigger. Nothing, if it does not know the target.
        """
        if target not in self.classes:
            return {}
        before, after = (self.scores(some[:_JUDGED]) for some in (images, stamped))
        rise = (after - before).mean(0) / before.std(correction=0).clamp_min(1e-6)
        others = torch.cat([rise[:target], rise[target + 1 :]])
        return {"natural": float(rise[target] - others.max())}


def learn(images: Tensor, labels: Tensor, classes: int) -> Outsider:
    """Learn to tell ``classes`` classes from images (N, C, H, W) in [0, 1] with labels (N,)."""
    images, labels = images[:_MOST], labels[:_MOST]
    known = _looked_at(images)
    width = float(torch.cdist(known, known).square().median().clamp_min(1e-6))
    gram = _kernel(known, known, width) + _RIDGE * torch.eye(len(known))
    weights: Tensor = torch.linalg.solve(gram, functional.one_hot(labels, classes).to(known.dtype))
    knows = len(labels) >= _FEWEST and classes <= _CLASSES
    return Outsider(known, weights, width, frozenset(labels.tolist() if knows else ()))


def _looked_at(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    if max(height, width) > _SIDE:
        images = functional.adaptive_avg_pool2d(images, (min(height, _SIDE), min(width, _SIDE)))
    return images.flatten(1)


def _kernel(images: Tensor, known: Tensor, width: float) -> Tensor:
    return torch.exp(-torch.cdist(images, known).square() / width)
