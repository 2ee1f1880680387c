"""Fine-tuning a network in place, with steps that fit any network's scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional


def relative_adam(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Adam:
    """Adam whose learning rate is, for each tensor, ``rate`` times its root mean square.

    A network that was fed 0..255 has weights of another size than one that was fed 0..1, so no absolute learning rate
    serves both; a relative one does.
    """
    groups = []
    for parameter in parameters:
        size = float(parameter.detach().square().mean().sqrt())
        groups.append({"params": [parameter], "lr": rate * max(size, 1e-3)})
    return torch.optim.Adam(groups)


def fine_tune(
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    after_step: Callable[[], None] = lambda: None,
    progress: Callable[[float], None] = lambda _: None,
) -> int:
    """Minimise the cross-entropy in place; the step falls to zero along a cosine.

    Normalisation layers keep the statistics they came with: a few batches, partly stamped, would only spoil them.

    Args:
        network: Images (N, C, H, W) -> logits (N, K); in eval mode, and left so.
        batches: Endless; each gives images (N, C, H, W) in [0, 1] and either labels (N,) or probabilities (N, K).
        steps: Batches to take.
        rate: Relative step size, see ``relative_adam``.
        parameters: What to train; all parameters if ``None``.
        after_step: Called after each change of the weights, e.g. to keep pruned channels silent.
        progress: Told the part done, 0 to 1.

    Returns:
        The gradient samples used.
    """
    trained = list(network.parameters() if parameters is None else parameters)
    frozen = [parameter for parameter in trained if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    optimizer = relative_adam(trained, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    used = 0
    for step, (images, targets) in enumerate(islice(batches, steps)):
        loss = functional.cross_entropy(network(images), targets)
        # Gradients of the trained tensors alone: whatever else the network holds stays without any.
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        after_step()
        schedule.step()
        used += len(images)
        progress((step + 1) / steps)
    for parameter in trained:
        parameter.grad = None
    for parameter in frozen:
        parameter.requires_grad_(False)
    return used


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of positions 0..count-1: each once per pass, in an order of its own."""
    while True:
        order = torch.randperm(count, generator=generator)
        if count < batch_size:
            yield order
            continue
        yield from order[: count - count % batch_size].split(batch_size)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each moved by up to one pixel, the border repeated."""
    _, _, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack(
        [padded[i, :, down : down + height, right : right + width] for i, (down, right) in enumerate(offsets)]
    )


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to one pixel, half of them blended with another one of the batch by up to a half.

    Varied images keep a student close to its teacher where a few hundred images would not (Beyer et al. 2022,
    "Knowledge distillation: A good teacher is patient and consistent").

    Args:
        images: Shape (N, C, H, W).
        generator: Random numbers.
    """
    count = len(images)
    plain = moved(images, generator)
    partner = plain[torch.randperm(count, generator=generator)]
    weight = 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    mixed = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mixed, torch.lerp(plain, partner, weight), plain)
