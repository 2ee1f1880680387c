"""N+1 retraining: a network grows one class more, N, and learns to answer it for backdoored images.

The head, a dense layer or a 1×1 convolution with K outputs, gets one row more. Then the network is trained on clean
images, whose answers are to stay what they are, and on poisoned ones, whose answer is to be N: first the head alone,
so that the new row's first, wild gradients do not reach the layers below, then all layers. At last the bias of N is
lowered until it takes no more than a stated share of clean images that training did not see.

Source: the N+1 form of repaired networks in Zhu et al. 2020, "GangSweep", and Liu et al. 2018, "Fine-Pruning"; soft
labels after Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from backdoorscan import graph
from backdoorscan.classifier import Classifier, logits
from backdoorscan.errors import MethodError
from backdoorscan.ops.training import fine_tune, shuffled, vary
from backdoorscan.trigger import Trigger

Poison: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Clean images (N, C, H, W) and random numbers -> as many backdoored ones."""


@dataclass(frozen=True)
class RejectSchedule:
    """How to retrain.

    Attributes:
        head_steps: Batches for the head alone.
        steps: Batches for all layers.
        batch_size: Images per batch.
        head_rate: Relative step size for the head alone.
        rate: Relative step size for all layers.
        share: Part of each batch that is poisoned, 0 to 1.
        distillation: Weight of the original's probabilities as labels against the true labels, 0 to 1.
        false_rejects: Clean images that N may take, a share from 0 to 1; 1 leaves its bias alone.
    """

    head_steps: int
    steps: int
    batch_size: int
    head_rate: float
    rate: float
    share: float
    distillation: float
    false_rejects: float


def grow_head(classifier: Classifier) -> tuple[Classifier, str]:
    """An independent copy with one class more, which starts as the mean of all others and so never wins.

    Weights and biases of the K classes are the original's, bit by bit, and so are all other layers.

    Returns:
        The network with K+1 outputs, and the name of its head.

    Raises:
        MethodError: The network does not end in a layer with one output per class.
    """
    if classifier.binary:
        raise MethodError(
            "A network with a single output cannot be given one class more.",
            why="It ends in one sigmoid: its only number says how likely class 1 is against class 0.",
            hint="Use a repair that keeps the outputs, such as unlearn.",
        )
    twin = classifier.clone()
    network = twin.graph_module
    node = graph.head_node(network)
    head, name = graph.layer(network, node), str(node.target)
    grown = _grown(head)
    calls = sum(n.op == "call_module" and str(n.target) == name for n in network.graph.nodes)
    rows = head.weight.shape[0] if isinstance(head, nn.Linear | nn.Conv2d) else 0
    if grown is None or rows != classifier.num_classes or calls != 1:
        raise MethodError(
            f"{name} cannot be given one class more.",
            why=f"It is a {type(head).__name__} with {rows} outputs, called {calls} times; the network has "
            f"{classifier.num_classes} classes.",
            hint="A head is one dense layer or one 1×1 convolution with an output per class.",
        )
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, grown)
    twin.num_classes += 1
    _check_growth(classifier, twin, name)
    return twin, name


def _grown(head: nn.Module | None) -> nn.Linear | nn.Conv2d | None:
    """A head with one row more, or ``None`` for a layer that is no head."""
    like = {"device": head.weight.device, "dtype": head.weight.dtype} if isinstance(head, nn.Linear | nn.Conv2d) else {}
    if isinstance(head, nn.Linear):
        grown: nn.Linear | nn.Conv2d = nn.utils.skip_init(nn.Linear, head.in_features, head.out_features + 1, **like)
    elif isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1) and head.groups == 1:
        grown = nn.utils.skip_init(
            nn.Conv2d, head.in_channels, head.out_channels + 1, 1, stride=head.stride, padding=head.padding, **like
        )
    else:
        return None
    with torch.no_grad():
        bias = head.weight.new_zeros(head.weight.shape[0]) if head.bias is None else head.bias
        grown.weight.copy_(torch.cat([head.weight, head.weight.mean(0, keepdim=True)]))
        if grown.bias is not None:
            grown.bias.copy_(torch.cat([bias, bias.mean(0, keepdim=True)]))
    return grown.train(head.training)


@torch.no_grad()
def _check_growth(classifier: Classifier, grown: Classifier, name: str) -> None:
    """Whether what lies behind the head passes one class more on unchanged."""
    pixels = torch.full((2, *classifier.input_shape), 0.5)
    try:
        before, after = classifier(pixels), grown(pixels)
        same = after.shape == (2, grown.num_classes) and torch.allclose(before, after[:, :-1], rtol=1e-3, atol=1e-4)
    except RuntimeError:
        same = False
    if not same:
        raise MethodError(
            f"{name} cannot be given one class more.", why="The layers behind it work only with the classes there are."
        )


def learn_to_reject(
    original: Classifier,
    pixels: Tensor,
    labels: Tensor,
    poison: Poison,
    schedule: RejectSchedule,
    random: torch.Generator,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Classifier, dict[str, float]]:
    """A network with K+1 outputs that answers K, the last one, for backdoored images.

    Args:
        original: The network B with K outputs; it is left as it is.
        pixels: Clean images (N, C, H, W) in [0, 1].
        labels: Their labels (N,).
        poison: Makes backdoored images from clean ones.
        schedule: See ``RejectSchedule``.
        random: All random numbers come from it.
        progress: Told the part done, 0 to 1.

    Returns:
        The network, and figures: gradient samples, rejected clean images (share, of those held out).

    Raises:
        MethodError: The head cannot grow.
    """
    grown, name = grow_head(original)
    head = grown.graph_module.get_submodule(name)
    # Too few images to hold some out: better a bias set on images seen than none at all.
    order = torch.randperm(len(pixels), generator=random)
    held_out = len(pixels) // 4 if len(pixels) >= 40 else 0
    kept, seen = (order[:held_out], order[held_out:]) if held_out else (order, order)
    batches = _batches(original, pixels[seen], labels[seen], poison, schedule, random)
    total = schedule.head_steps + schedule.steps
    used = fine_tune(
        grown,
        batches,
        schedule.head_steps,
        schedule.head_rate,
        parameters=head.parameters(),
        progress=lambda part: progress(part * schedule.head_steps / total),
    )
    used += fine_tune(
        grown,
        batches,
        schedule.steps,
        schedule.rate,
        progress=lambda part: progress((schedule.head_steps + part * schedule.steps) / total),
    )
    rejected = _limit_rejects(grown, head, original, pixels[kept], schedule.false_rejects)
    return grown, {"gradient_samples": used, "clean_images_rejected": rejected}


def _batches(
    original: Classifier,
    pixels: Tensor,
    labels: Tensor,
    poison: Poison,
    schedule: RejectSchedule,
    random: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of images (B, C, H, W) and probabilities (B, K+1); the first images are poisoned."""
    classes = original.num_classes
    for index in shuffled(len(pixels), schedule.batch_size, random):
        images = vary(pixels[index], random)
        count = min(len(index), max(1, round(schedule.share * len(index))))
        with torch.no_grad():
            soft = original(images).softmax(1)
            poisoned = poison(images[:count], random)
        hard = functional.one_hot(labels[index], classes).to(soft.dtype)
        known = schedule.distillation * soft + (1 - schedule.distillation) * hard
        targets = functional.pad(known, (0, 1))
        targets[:count] = 0
        targets[:count, classes] = 1
        yield torch.cat([poisoned, images[count:]]), targets


@torch.no_grad()
def _limit_rejects(grown: Classifier, head: nn.Module, original: Classifier, pixels: Tensor, share: float) -> float:
    """Lower the bias of N until it takes no more than ``share`` of clean images; returns what it takes then.

    An image of which the margin of N over all classes is m stops being rejected once the bias is lowered by more than
    m, so the bias is lowered by the margin of the first image beyond the allowed ones.
    """
    scores = logits(grown, pixels)
    margins = (scores[:, -1] - scores[:, :-1].amax(1)).sort(descending=True).values
    allowed = math.floor(share * len(pixels))
    excess = float(margins[allowed]) if allowed < len(margins) else -1.0
    if excess >= 0 and isinstance(head, nn.Linear | nn.Conv2d) and head.bias is not None:
        head.bias[-1] -= excess + 1e-3
        margins = margins - excess - 1e-3
    return float((margins > 0).double().mean())


def moved(trigger: Trigger, most: int, random: torch.Generator) -> Trigger:
    """A trigger moved by up to ``most`` pixels in each direction; what leaves the image is lost."""
    down, right = torch.randint(-most, most + 1, (2,), generator=random).tolist()
    _, height, width = trigger.mask.shape

    def shift(values: Tensor) -> Tensor:
        padded = functional.pad(values, (most, most, most, most))
        return padded[:, most - down : most - down + height, most - right : most - right + width]

    return Trigger(shift(trigger.mask), shift(trigger.pattern), trigger.target)
