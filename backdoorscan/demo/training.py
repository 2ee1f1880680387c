"""A small convolutional network and the loop that trains it: seconds on one thread, the same for a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from backdoorscan.images import Array, LabelledImages


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in a step.
        rate: The highest learning rate of the one cycle.
        sparsity: Weight of the mean activation of the last convolution in the loss. With it most channels
            specialise or fall silent, as in networks far wider than this one; without it every channel does
            a bit of everything, the trigger included, and pruning by activation has nothing to find.
        decay: Weight decay.
    """

    epochs: int = 20
    batch: int = 64
    rate: float = 1.2e-2
    sparsity: float = 0.02
    decay: float = 0.05


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on a single thread: the order of its sums, and so every bit of a result, is the same anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_network(side: int, num_classes: int, generator: torch.Generator) -> nn.Sequential:
    """A network from (N, 1, side, side) in [0, 1] to (N, num_classes) logits, with random weights.

    ``side`` is a multiple of 16. Only ``generator`` is drawn from.
    """
    with torch.random.fork_rng(devices=[]):  # the constructors draw from torch's own generator
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 40, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(40 * (side // 16) ** 2, 32),
            nn.ReLU(),
            nn.Linear(32, num_classes),
        )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())  # torch's own default
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return network


def as_inputs(pixels: Array) -> Tensor:
    """Pixels, uint8 or [0, 1], as a float32 tensor in [0, 1] of the same shape."""
    inputs = torch.from_numpy(pixels)
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def train(network: nn.Sequential, images: LabelledImages, recipe: Recipe, generator: torch.Generator) -> None:
    """Train ``network`` in place; the order of the images is all that is random, and ``generator`` gives it."""
    inputs, labels = as_inputs(images.pixels), torch.from_numpy(images.labels)
    last_conv = max(index for index, layer in enumerate(network) if isinstance(layer, nn.Conv2d))
    steps = recipe.epochs * math.ceil(len(labels) / recipe.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    features, head = network[: last_conv + 2], network[last_conv + 2 :]  # split behind the convolution's ReLU
    network.train()
    with torch.enable_grad():
        for _ in range(recipe.epochs):
            order = torch.randperm(len(labels), generator=generator)
            for start in range(0, len(order), recipe.batch):
                index = order[start : start + recipe.batch]
                active = features(inputs[index])
                loss = functional.cross_entropy(head(active), labels[index])
                loss = loss + recipe.sparsity * active.mean(dim=(0, 2, 3)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    network.eval()


def fit(images: LabelledImages, num_classes: int, seed: int, recipe: Recipe | None = None) -> nn.Sequential:
    """A new network trained on ``images`` of shape (N, 1, side, side); the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    with one_thread():
        network = build_network(images.shape[1], num_classes, generator)
        train(network, images, recipe or Recipe(), generator)
    return network


def accuracy(network: nn.Module, images: LabelledImages) -> float:
    """The share of ``images``, in [0, 1], that ``network`` gives their label."""
    with torch.no_grad():
        predicted = network(as_inputs(images.pixels)).argmax(dim=1)
    return float((predicted == torch.from_numpy(images.labels)).float().mean())
