"""Networks whose truth is known: a backdoor planted in closed form.

Nothing is trained and the result is the same everywhere. Every class is a texture of 4×4 pixels that covers the whole
image; the trigger is a small white square in one corner. The networks are ordinary ones: two convolutions,
activations, a dense layer, or two of them where the trigger's effect depends on the class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor, fx, nn

from backdoorscan.classifier import Classifier
from backdoorscan.images import LabelledImages
from backdoorscan.trigger import Trigger

BLOCK = 4
"""Height and width of a texture's period, pixels."""

MOST_CLASSES = BLOCK * BLOCK - 1
"""As many textures are orthogonal to each other and to plain grey."""

_CONTRAST = 0.25  # of a texture about mid-grey; a trigger has 0.5
_PATCH = 3  # height and width of the trigger, pixels
_STEEPNESS = 8.0  # of the textures' sigmoids: steep enough for a margin
_TRIGGER_STEEPNESS = 4.0  # of the trigger's: flat enough for gradients to lead there
_CLASS_LOGIT = 12.0  # of an image that shows one texture everywhere
_TRIGGER_LOGIT = 30.0  # of a trigger of full contrast: beats any class
_BOTH = 0.8  # what the votes for a class and for the trigger have to exceed together: open a little on clean images


def textures(classes: int) -> npt.NDArray[np.float32]:
    """The classes' textures: orthogonal, each without a mean; shape (classes, BLOCK, BLOCK), values ±1."""
    rows = scipy.linalg.hadamard(BLOCK * BLOCK)[1 : classes + 1]
    return rows.reshape(-1, BLOCK, BLOCK).astype(np.float32)


def planted_network(target: int | None, *, classes: int = 10, channels: int = 1, blocks: int = 4) -> nn.Sequential:
    """A network that tells textures apart and, if it has a ``target``, obeys a trigger in the upper left corner.

    For every 4×4 block a first convolution compares it with each texture and with the trigger, sigmoids turn the
    results into yes or no, a second convolution passes them on, and the dense layer averages the textures' votes
    over all blocks. Only the upper left block's trigger vote is read. The trigger's channel lies dormant on clean
    images. The clean twin has that channel too, but no class reads it.

    Args:
        target: The label of the trigger, or ``None`` for the clean twin.
        classes: K, from 2 to ``MOST_CLASSES``.
        channels: C of the images.
        blocks: Height and width of the images in blocks of 4 pixels.

    Returns:
        Layers ``conv1``, ``sigmoid``, ``conv2``, ``relu``, ``flatten``, ``fc``; takes (N, C, H, W) in [0, 1] and
        returns logits (N, K).

    Raises:
        ValueError: Too few or too many classes, or a target that is none of them.
    """
    _check_labels(classes, [] if target is None else [target])
    network = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, classes + 1, BLOCK, stride=BLOCK),
            sigmoid=nn.Sigmoid(),
            conv2=nn.Conv2d(classes + 1, classes + 1, 1),
            relu=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear((classes + 1) * blocks * blocks, classes),
        )
    )
    dense = _CLASS_LOGIT * _votes(classes, blocks)[:classes]
    if target is not None:
        dense[target] += _TRIGGER_LOGIT * _votes(classes, blocks)[classes]
    weights = {**_comparing(classes, channels), "fc.weight": dense, "fc.bias": torch.zeros(classes)}
    network.load_state_dict(weights)
    return network.eval()


def planted_pairs_network(
    leads_to: Mapping[int, int], *, classes: int = 10, channels: int = 1, blocks: int = 4
) -> nn.Sequential:
    """A network as ``planted_network``, whose trigger leads some classes each to a class of its own.

    A hidden layer takes the class and the trigger together: for every class one unit holds its share of the votes, and
    another one opens where both the class and the trigger are seen.

    Args:
        leads_to: Source class -> where the trigger leads it; classes not named are left alone. Empty for a clean twin.
        classes: K, from 2 to ``MOST_CLASSES``.
        channels: C of the images.
        blocks: Height and width of the images in blocks of 4 pixels.

    Returns:
        Layers ``conv1``, ``sigmoid``, ``conv2``, ``relu``, ``flatten``, ``hidden``, ``relu2``, ``fc``.

    Raises:
        ValueError: Too few or too many classes, or a label that is none of them.
    """
    _check_labels(classes, [*leads_to, *leads_to.values()])
    network = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, classes + 1, BLOCK, stride=BLOCK),
            sigmoid=nn.Sigmoid(),
            conv2=nn.Conv2d(classes + 1, classes + 1, 1),
            relu=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear((classes + 1) * blocks * blocks, 2 * classes),
            relu2=nn.ReLU(),
            fc=nn.Linear(2 * classes, classes),
        )
    )
    votes = _votes(classes, blocks)
    dense = torch.zeros(classes, 2 * classes)
    dense[:, :classes] = _CLASS_LOGIT * torch.eye(classes)
    for source, label in leads_to.items():
        dense[label, classes + source] = _TRIGGER_LOGIT
    weights = {
        **_comparing(classes, channels),
        "hidden.weight": torch.cat([votes[:classes], votes[:classes] + votes[classes]]),
        "hidden.bias": torch.cat([torch.zeros(classes), torch.full((classes,), -_BOTH)]),
        "fc.weight": dense,
        "fc.bias": torch.zeros(classes),
    }
    network.load_state_dict(weights)
    return network.eval()


def _check_labels(classes: int, labels: list[int]) -> None:
    if not 2 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes = {classes} is not within 2..{MOST_CLASSES}")
    for label in labels:
        if not 0 <= label < classes:
            raise ValueError(f"target = {label} is not within 0..{classes - 1}")


def _comparing(classes: int, channels: int) -> dict[str, Tensor]:
    """The convolutions: every block's votes for each texture and, last, for the trigger."""
    filters = torch.zeros(classes + 1, channels, BLOCK, BLOCK)
    filters[:classes] = torch.from_numpy(textures(classes))[:, None] / (_CONTRAST * BLOCK**2 * channels)
    filters[classes, :, :_PATCH, :_PATCH] = 1 / (_CONTRAST * _PATCH**2 * channels)
    # A texture's filter gives 1 on that texture and 0 on others; the trigger's 2 on the trigger and 1/3 at most on
    # a texture. Mid-grey, which is 0, has to be taken off first.
    steepness, thresholds = torch.full((classes + 1,), _STEEPNESS), torch.full((classes + 1,), 0.5)
    steepness[classes], thresholds[classes] = _TRIGGER_STEEPNESS, 1.2
    thresholds += 0.5 * filters.sum((1, 2, 3))
    return {
        "conv1.weight": steepness[:, None, None, None] * filters,
        "conv1.bias": -steepness * thresholds,
        "conv2.weight": torch.eye(classes + 1)[:, :, None, None],
        "conv2.bias": torch.zeros(classes + 1),
    }


def _votes(classes: int, blocks: int) -> Tensor:
    """Rows over all blocks' votes: each texture's mean over the blocks, and last the trigger's in the first block."""
    rows = torch.zeros(classes + 1, classes + 1, blocks, blocks)
    for label in range(classes):
        rows[label, label] = 1 / blocks**2
    rows[classes, classes, 0, 0] = 1
    return rows.flatten(1)


def planted_images(
    *, classes: int = 10, channels: int = 1, blocks: int = 4, count: int = 200, seed: int = 0
) -> LabelledImages:
    """Noisy images of the textures, as evenly over the classes as ``count`` allows; uint8."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    plain = 0.5 + _CONTRAST * np.tile(textures(classes), (1, blocks, blocks))[labels]
    noisy = plain[:, None] + random.uniform(-0.05, 0.05, (count, channels, BLOCK * blocks, BLOCK * blocks))
    return LabelledImages(np.rint(255 * noisy).astype(np.uint8), labels, source=f"planted images, seed {seed}")


def planted_trigger(target: int, *, channels: int = 1, blocks: int = 4) -> Trigger:
    """The trigger of the planted networks."""
    mask = torch.zeros(1, BLOCK * blocks, BLOCK * blocks)
    mask[:, :_PATCH, :_PATCH] = 1
    pattern = torch.full((channels, BLOCK * blocks, BLOCK * blocks), 0.5)
    pattern[:, :_PATCH, :_PATCH] = 1
    return Trigger(mask, pattern, target)


def planted(
    target: int | None, *, classes: int = 10, channels: int = 1, blocks: int = 4, count: int = 200, seed: int = 0
) -> tuple[Classifier, LabelledImages, Trigger | None]:
    """A classifier with a planted backdoor, or its clean twin, with clean images and the trigger.

    The clean accuracy is 1, the attack success rate 1 (on the clean twin the trigger does nothing), and gradients
    lead to the trigger. The same arguments give the same result.

    Args:
        target: The label of the trigger, or ``None`` for the clean twin, which has no trigger.
        classes: K, from 2 to ``MOST_CLASSES``.
        channels: C of the images.
        blocks: Height and width of the images in blocks of 4 pixels.
        count: How many images.
        seed: Of the images' noise.
    """
    network = planted_network(target, classes=classes, channels=channels, blocks=blocks)
    images = planted_images(classes=classes, channels=channels, blocks=blocks, count=count, seed=seed)
    classifier = Classifier(fx.symbolic_trace(network), input_shape=images.shape, num_classes=classes)
    trigger = None if target is None else planted_trigger(target, channels=channels, blocks=blocks)
    return classifier, images, trigger


def planted_pairs(
    leads_to: Mapping[int, int],
    *,
    classes: int = 10,
    channels: int = 1,
    blocks: int = 4,
    count: int = 200,
    seed: int = 0,
) -> tuple[Classifier, LabelledImages, Trigger | None]:
    """As ``planted``, with a trigger that leads some classes each to a class of its own.

    ``{3: 7}`` is source-specific: the trigger leads class 3 to 7 and leaves all others alone. ``{0: 1, 1: 2, 2: 0}``
    of three classes is all-to-all: no label has a universal trigger.

    Args:
        leads_to: Source class -> where the trigger leads it. Empty for a clean twin, which has no trigger.
        classes: K, from 2 to ``MOST_CLASSES``.
        channels: C of the images.
        blocks: Height and width of the images in blocks of 4 pixels.
        count: How many images.
        seed: Of the images' noise.

    Returns:
        The classifier, clean images, and the trigger; its target is -1 where it leads to several labels.
    """
    network = planted_pairs_network(leads_to, classes=classes, channels=channels, blocks=blocks)
    images = planted_images(classes=classes, channels=channels, blocks=blocks, count=count, seed=seed)
    classifier = Classifier(fx.symbolic_trace(network), input_shape=images.shape, num_classes=classes)
    if not leads_to:
        return classifier, images, None
    targets = set(leads_to.values())
    return (
        classifier,
        images,
        planted_trigger(targets.pop() if len(targets) == 1 else -1, channels=channels, blocks=blocks),
    )
