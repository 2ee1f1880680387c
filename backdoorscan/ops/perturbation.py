"""Universal perturbations other than a patch: something added to every pixel, and a warping of the image.

A trigger that is blended over the whole image or bends it has no small mask, so each kind of trigger is sought in its
own terms, in the way of Neural Cleanse: the smallest perturbation of that kind that sends the images of all other
classes to a label, for all labels in one batch. The warp is that of WaNet (Nguyen, Tran 2021, section 3.2):
displacements on a coarse grid, interpolated over the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier
from backdoorscan.ops.inversion import CostState, Schedule
from backdoorscan.ops.searching import Descent, draw, frozen


class Family(Protocol):
    """One kind of perturbation, a row of parameters per label."""

    parameters: Tensor

    def apply(self, images: Tensor, rows: Tensor) -> Tensor:
        """Images (R, B, C, H, W) in [0, 1] under the perturbations of R rows."""

    def size(self, rows: Tensor) -> Tensor:
        """How large they are, shape (R,), above 0."""


class Additive:
    """Something added to every pixel; its size is its Euclidean norm, a white pixel being 1."""

    def __init__(self, rows: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        self.parameters = (0.02 * torch.randn(rows, *shape, generator=generator)).requires_grad_()

    def apply(self, images: Tensor, rows: Tensor) -> Tensor:
        """See ``Family``."""
        return (images + self.parameters[rows][:, None]).clamp(0, 1)

    def size(self, rows: Tensor) -> Tensor:
        """See ``Family``."""
        return (self.parameters[rows].flatten(1).square().sum(1) + 1e-8).sqrt()


class Warp:
    """A displacement of every pixel, smooth over the image; its size is the root mean square, in pixels."""

    GRID = 5

    def __init__(self, rows: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        self.parameters = (0.3 * torch.randn(rows, 2, self.GRID, self.GRID, generator=generator)).requires_grad_()
        _, self.height, self.width = shape
        down, right = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        self._places = torch.stack([right, down], -1).float()

    def _flow(self, rows: Tensor) -> Tensor:
        size = (self.height, self.width)
        return functional.interpolate(self.parameters[rows], size, mode="bicubic", align_corners=True)

    def apply(self, images: Tensor, rows: Tensor) -> Tensor:
        """See ``Family``."""
        places = self._places + self._flow(rows).permute(0, 2, 3, 1)
        # grid_sample counts from -1 to 1 over the image.
        places = 2 * places / torch.tensor([max(self.width - 1, 1), max(self.height - 1, 1)]) - 1
        places = places[:, None].expand(-1, images.shape[1], -1, -1, -1).flatten(0, 1)
        warped = functional.grid_sample(images.flatten(0, 1), places, padding_mode="border", align_corners=True)
        return warped.view_as(images)

    def size(self, rows: Tensor) -> Tensor:
        """See ``Family``."""
        return (self._flow(rows).square().flatten(1).mean(1) + 1e-8).sqrt()


@dataclass(frozen=True)
class Found:
    """The perturbation found for one label.

    Attributes:
        size: Of the smallest one that held the success rate, else of the last one tried.
        succeeded: Whether any did.
        apply: Images (N, C, H, W) in [0, 1] -> images under it.
        parameters: Its parameters.
    """

    size: float
    succeeded: bool
    apply: Callable[[Tensor], Tensor]
    parameters: Tensor


def find_perturbations(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[int],
    family: Family,
    schedule: Schedule,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[list[Found], int]:
    """Search the smallest perturbation of a kind for each target label.

    Args:
        classifier: Its parameters are left without gradients while it runs.
        images: Shape (N, C, H, W) in [0, 1].
        labels: Shape (N,); images of a target's own class are not used for it.
        targets: Labels to search; each needs at least one image of another class.
        family: A row per target.
        schedule: How long to search and how to adapt the cost; one start each.
        generator: All random numbers come from it.
        progress: Told the part done, 0 to 1.

    Returns:
        One result per target, in their order, and the gradient samples used.
    """
    state = CostState(len(targets), schedule)
    descent = Descent([family.parameters], schedule.learning_rate)
    aims, rows = torch.tensor(targets), torch.arange(len(targets))
    pools = [(labels != target).nonzero().flatten() for target in targets]
    best = family.parameters.detach().clone()
    used = 0
    with frozen(classifier):
        for step in range(schedule.steps):
            active = state.active.nonzero().flatten()
            if len(active) == 0:
                break
            drawn = torch.stack([draw(pools[row], schedule.batch_size, generator) for row in active.tolist()])
            scores = classifier(family.apply(images[drawn], active).flatten(0, 1))
            wanted = aims[active].repeat_interleave(schedule.batch_size)
            used += len(wanted)
            entropy = functional.cross_entropy(scores, wanted, reduction="none").view(len(active), -1).mean(1)
            size = family.size(active)
            before = family.parameters.detach().clone()
            descent.step((entropy + state.cost[active] * size).sum())
            hits = (scores.argmax(1) == wanted).float().view(len(active), -1).mean(1)
            improved = active[state.update(active, hits, size.detach())]
            best[improved] = before[improved]
            progress((step + 1) / schedule.steps)
    succeeded = [math.isfinite(value) for value in state.best.tolist()]
    with torch.no_grad():
        kept = torch.tensor(succeeded)
        family.parameters[kept] = best[kept]
        sizes = family.size(rows).tolist()
    return [
        Found(sizes[row], succeeded[row], _applied(family, row), family.parameters[row].detach().clone())
        for row in rows.tolist()
    ], used


def _applied(family: Family, row: int) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def apply(images: Tensor) -> Tensor:
        return family.apply(images[None], torch.tensor([row]))[0]

    return apply
