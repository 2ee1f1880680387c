"""Finding out how a network was fed, by trying the usual ways on clean images.

A file rarely says whether its images were 0..1 or 0..255. A wrong guess does not fail: it gives a network of poor
accuracy and meaningless triggers. So the clean images decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier, InputConvention, logits, to_tensor
from backdoorscan.errors import ConventionError
from backdoorscan.images import LabelledImages

SAMPLE = 256
"""Images that decide; enough to tell conventions apart, few enough for large networks."""

_CHANCE_LEVEL = 0.01
"""A convention must beat guessing at this significance."""

_PLAIN = (InputConvention(0, 1), InputConvention(-1, 1), InputConvention(0, 255))
"""In order of scale: see ``_choose``."""

_NORMALISED = {
    1: (InputConvention(mean=(0.1307,), std=(0.3081,)),),
    3: (
        InputConvention(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        InputConvention(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    ),
}
"""Statistics that training scripts for MNIST, ImageNet and CIFAR-10 share, by number of channels."""


@dataclass(frozen=True)
class Trial:
    """How one convention did on the sample.

    Attributes:
        convention: What was tried.
        accuracy: Part of the sample classified correctly, 0 to 1.
        loss: Mean cross-entropy in nats.
    """

    convention: InputConvention
    accuracy: float
    loss: float


def candidates(
    channels: int, pinned: InputConvention | None, described: InputConvention | None = None
) -> list[InputConvention]:
    """The conventions to try, first the one that the file describes; only the pinned one if the user pinned it."""
    if pinned:
        return [pinned]
    usual = [*_PLAIN, *_NORMALISED.get(channels, ())]
    return [described, *(convention for convention in usual if convention != described)] if described else usual


def find(
    logits: Callable[[InputConvention, Tensor], Tensor],
    images: LabelledImages,
    tried: Sequence[InputConvention],
    num_classes: int,
    seed: int,
    described: InputConvention | None = None,
) -> tuple[Trial, list[Trial]]:
    """Choose the convention under which the network is right most often.

    Args:
        logits: The network's logits (N, K) for images (N, C, H, W) in [0, 1] under a convention.
        images: Clean labelled images.
        tried: Conventions; a single one counts as pinned and is not questioned.
        num_classes: K.
        seed: Chooses the sample of the images.
        described: The one of them that the file describes: taken unless another does clearly better.

    Returns:
        The choice and all trials.

    Raises:
        ConventionError: None is better than guessing.
    """
    sample = images.sample(SAMPLE, seed)
    pixels, labels = to_tensor(sample.pixels), torch.from_numpy(sample.labels)
    trials = []
    with torch.no_grad():
        for convention in tried:
            scores = torch.cat([logits(convention, part) for part in pixels.split(64)])
            loss = functional.cross_entropy(scores, labels).item()
            accuracy = (scores.argmax(1) == labels).double().mean().item()
            trials.append(Trial(convention, accuracy, loss if np.isfinite(loss) else float("inf")))
    if len(trials) == 1:
        return trials[0], trials
    chosen = _choose(trials, len(sample), num_classes, described)
    if guesses(round(chosen.accuracy * len(sample)), len(sample), num_classes):
        figures = ", ".join(f"{describe(t.convention)} {t.accuracy:.0%}" for t in trials)
        raise ConventionError(
            "No usual way to feed the clean images makes this model better than guessing.",
            why=f"Accuracy on {len(sample)} images: {figures}.",
            hint="Check that the images and labels are the model's own, or pass --input-range or --mean/--std.",
        )
    return chosen, trials


def guesses(hits: int, count: int, num_classes: int) -> bool:
    """Whether ``hits`` right answers on ``count`` images may well be guessed, each with chance 1 in ``num_classes``."""
    return bool(stats.binom.sf(hits - 1, count, 1 / num_classes) > _CHANCE_LEVEL)


def on_clean(classifier: Classifier, images: LabelledImages) -> tuple[float, str]:
    """The accuracy on the clean images, 0 to 1, and if it is that of guessing, a note that says so, else an empty one.

    A convention that the user pins is not questioned when the file is read, and can be wrong. Where even right answers
    alone would be no proof of more than guessing, as on one image, there is nothing to note.
    """
    hits = int((logits(classifier, to_tensor(images.pixels)).argmax(1) == torch.from_numpy(images.labels)).sum())
    count, classes = len(images), classifier.num_classes
    if not guesses(hits, count, classes) or guesses(count, count, classes):
        return hits / count, ""
    return hits / count, (
        f"accuracy of {hits / count:.1%} on {count} images is no better than guessing: the images, their labels or "
        "the input range may not be the model's own"
    )


def describe(convention: InputConvention) -> str:
    """The convention in words, without the axis order."""
    return str(replace(convention, layout="")).strip()


def _choose(trials: Sequence[Trial], count: int, num_classes: int, described: InputConvention | None) -> Trial:
    """The best trial; among those that chance alone can tell apart, the described one, or else the plainest.

    A network fed too faintly is unsure, fed too strongly only surer of itself. So among equals the loss cannot
    simply decide: the first one in order of scale that is sure enough is taken.
    """
    best = max(trial.accuracy for trial in trials)
    noise = 2 * np.sqrt(max(best * (1 - best), 1 / count) / count)
    tied = [trial for trial in trials if trial.accuracy >= best - noise]
    said = [trial for trial in tied if trial.convention == described]
    if said:
        return said[0]
    plain = [trial for trial in tied if not trial.convention.mean]
    pool = plain or tied
    sure = [trial for trial in pool if trial.loss <= 0.25 * np.log(num_classes)]
    return sure[0] if sure else min(pool, key=lambda trial: trial.loss)
