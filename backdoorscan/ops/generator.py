"""Perturbation masks made by a network: one small generator per target label.

Source: Zhu, Ning, Wang, Xin, Wang 2020, "GangSweep: Sweep out Neural Backdoors by GAN". A generator G is trained so
that every image x, once its own mask is added, goes to the label t:

    x' = clip(x + G(x), 0, 1)
    min over G:  α · mean max(max_{j≠t} z_j(x') - z_t(x') + κ, 0)  +  mean ‖G(x)‖₂ / √(C·H·W)

with the logits z in units of the network's own margin on clean images, so that the same α serves any network. (On
probabilities the hinge has no slope where a network is sure of itself.) α falls while the attack works and rises
while it does not, so the masks of all labels end as small as the same success allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from backdoorscan.ops.searching import frozen
from backdoorscan.ops.training import shuffled

_PAST = 0.8
"""Weight of earlier batches in the success rate that moves α."""

_PLACE_SCALE = 10.0
"""Of the map of places: Adam moves each of its values as far per step as each weight, and no other adds up to it."""


@dataclass(frozen=True)
class GeneratorSchedule:
    """How large a generator is and how it is trained.

    Attributes:
        width: Channels inside.
        blocks: Residual blocks.
        steps: Gradient steps.
        batch_size: Images per step.
        learning_rate: Of Adam; falls to a tenth along a cosine.
        alpha: Weight of the hinge at the start.
        alpha_factor: The weight falls by this factor at each step at which the attack works, and rises by it else.
        success: Success rate from which the attack works, 0 to 1.
        margin: κ, in units of the network's own margin.
    """

    width: int
    blocks: int
    steps: int
    batch_size: int
    learning_rate: float
    alpha: float
    alpha_factor: float
    success: float
    margin: float


class MaskGenerator(nn.Module):
    """A residual generator: images (N, C, H, W) in [0, 1] -> masks (N, C, H, W) in [-1, 1].

    A 9×9 convolution with PReLU, residual blocks of convolution, normalisation, PReLU, convolution, normalisation, a
    convolution with normalisation and a skip around all blocks, a 9×9 convolution, tanh: the generator of Ledig et
    al. 2017, "Photo-Realistic Single Image Super-Resolution", without its upsampling.

    Convolutions treat all places alike, and a trigger has one place; so a map of one value per pixel, the same for all
    images, is added before the tanh.

    Args:
        shape: (C, H, W) of an image.
        width: Channels inside.
        blocks: Residual blocks.
        random: Random numbers for the weights.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, blocks: int, random: torch.Generator) -> None:
        super().__init__()
        channels = shape[0]
        self.place = nn.Parameter(torch.zeros(shape))
        self.entry = nn.Sequential(_conv(channels, width, 9, random), nn.PReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _conv(width, width, 3, random),
                nn.BatchNorm2d(width),
                nn.PReLU(),
                _conv(width, width, 3, random),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.middle = nn.Sequential(_conv(width, width, 3, random), nn.BatchNorm2d(width))
        # Small at first: a generator that starts with large masks has to unlearn them.
        self.exit = _conv(width, channels, 9, random, gain=0.1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Masks (N, C, H, W) in [-1, 1]."""
        first = self.entry(2 * images - 1)
        inside = first
        for block in self.blocks:
            inside = inside + block(inside)
        masks: Tensor = self.exit(self.middle(inside) + first) + _PLACE_SCALE * self.place
        return masks.tanh()

    def perturb(self, images: Tensor) -> Tensor:
        """The images with their masks added, (N, C, H, W) in [0, 1]."""
        masks: Tensor = self(images)
        return (images + masks).clamp(0, 1)


def _conv(inputs: int, outputs: int, size: int, random: torch.Generator, gain: float = 1.0) -> nn.Conv2d:
    conv: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight, generator=random)
    with torch.no_grad():
        conv.weight.mul_(gain)
        if conv.bias is not None:
            conv.bias.zero_()
    return conv


def target_margin(logits: Tensor, target: int) -> Tensor:
    """How far the target's logit lies above the largest other one: logits (N, K) -> (N,)."""
    others = logits.clone()
    others[:, target] = -torch.inf
    return logits[:, target] - others.amax(1)


@torch.no_grad()
def typical_margin(network: nn.Module, images: Tensor) -> float:
    """Median distance between the two largest logits on clean images (N, C, H, W): a network's own unit."""
    top = torch.cat([network(part).topk(2, dim=1).values for part in images.split(256)])
    return max(float((top[:, 0] - top[:, 1]).median()), 1e-6)


def train_generator(
    classifier: nn.Module,
    images: Tensor,
    target: int,
    schedule: GeneratorSchedule,
    random: torch.Generator,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[MaskGenerator, int]:
    """Train a generator that sends images to ``target`` with masks as small as they can be.

    Args:
        classifier: Images (N, C, H, W) in [0, 1] -> logits (N, K), in eval mode; its weights are left alone.
        images: Shape (N, C, H, W), best of other classes than ``target``.
        target: The label.
        schedule: See ``GeneratorSchedule``.
        random: All random numbers come from it.
        progress: Told the part done, 0 to 1.

    Returns:
        The generator in eval mode, and the gradient samples used.
    """
    channels, height, width = images.shape[1:]
    generator = MaskGenerator((channels, height, width), schedule.width, schedule.blocks, random)
    unit = typical_margin(classifier, images)
    optimizer = torch.optim.Adam(generator.parameters(), lr=schedule.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps, eta_min=schedule.learning_rate / 10)
    weight, hits, used = schedule.alpha, 0.0, 0
    size = float(images[0].numel()) ** 0.5
    with frozen(classifier):
        for step, index in enumerate(islice(shuffled(len(images), schedule.batch_size, random), schedule.steps)):
            batch = images[index]
            masks = generator(batch)
            margin = target_margin(classifier((batch + masks).clamp(0, 1)), target) / unit
            hinge = functional.relu(schedule.margin - margin).mean()
            norm = masks.flatten(1).norm(dim=1).mean() / size
            optimizer.zero_grad()
            (weight * hinge + norm).backward()
            optimizer.step()
            cosine.step()
            hits = _PAST * hits + (1 - _PAST) * float((margin > 0).float().mean())
            works = hits / (1 - _PAST ** (step + 1)) >= schedule.success
            weight = (
                weight / schedule.alpha_factor if works else min(weight * schedule.alpha_factor, 100 * schedule.alpha)
            )
            used += len(batch)
            progress((step + 1) / schedule.steps)
    return generator.eval(), used
