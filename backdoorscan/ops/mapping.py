"""Search for one small trigger that sends every class to another class of its own: all-to-all backdoors.

For an all-to-all backdoor no label has a universal trigger, and to try every pair of classes grows with their square.
So a trigger is sought without saying where it should lead. First it maximises what the prediction on stamped images
tells about the image while the true class is to be wrong,

    min  -log(1 - p_y) - H(mean p) + mean H(p),

the entropy terms of Bridle, Heading, MacKay 1991: predictions certain, and spread over all classes. Then the best
assignment of classes to other classes is read off (Kuhn 1955) and searched for as in Neural Cleanse, with the mask's L1
norm. In a clean network no small trigger sends different classes different ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier
from backdoorscan.ops.searching import Descent, draw, frozen
from backdoorscan.trigger import Trigger, stamp

_HOLD = 0.85  # weight of the past in running averages
_RISE = 1.12  # of the weight of the L1 norm while the trigger works; it falls by the power 1.5


@dataclass(frozen=True)
class MappingSchedule:
    """How long to search.

    Attributes:
        free_steps: Steps without a mapping in mind.
        steps: Steps towards the mapping found.
        batch_size: Images per start and step.
        restarts: Independent starts; the one with the smallest trigger, or the most success, counts.
        learning_rate: Of Adam, with betas (0.5, 0.9).
        success: Success rate to hold while the mask shrinks, 0 to 1.
        hopeless: Success rate under which, ``patience`` steps into the pursuit, the search is given up.
        patience: See ``hopeless``.
    """

    free_steps: int
    steps: int
    batch_size: int
    restarts: int
    learning_rate: float
    success: float
    hopeless: float
    patience: int


@dataclass(frozen=True)
class Mapping:
    """What the search found.

    Attributes:
        leads_to: Shape (K,): the class that each class is sent to.
        trigger: The smallest trigger that held the success rate, else the last one; its target is -1.
        held: Whether any did.
    """

    leads_to: Tensor
    trigger: Trigger
    held: bool


def find_mapping(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    schedule: MappingSchedule,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Mapping, int]:
    """Search a trigger that sends every class to another one.

    Args:
        classifier: Its parameters are left without gradients while it runs.
        images: Shape (N, C, H, W) in [0, 1].
        labels: Shape (N,); what is said of classes without images means nothing.
        schedule: How long to search.
        generator: All random numbers come from it.
        progress: Told the part done, 0 to 1.

    Returns:
        The mapping and the gradient samples used.
    """
    classes, starts = classifier.num_classes, schedule.restarts
    pools = [(labels == label).nonzero().flatten() for label in labels.unique()]
    each = max(1, schedule.batch_size // len(pools))
    channels, height, width = classifier.input_shape
    mask_raw = (torch.randn(starts, 1, height, width, generator=generator) - 1).requires_grad_()
    pattern_raw = torch.randn(starts, channels, height, width, generator=generator).requires_grad_()
    descent = Descent([mask_raw, pattern_raw], schedule.learning_rate)
    cost, success, weight = torch.zeros(starts), torch.zeros(starts), 0.0
    best = torch.full((starts,), math.inf)
    kept_mask, kept_pattern = torch.zeros_like(mask_raw), torch.zeros_like(pattern_raw)
    seen = torch.zeros(starts, classes, classes)
    leads_to = torch.zeros(starts, classes, dtype=torch.long)
    total, used = schedule.free_steps + schedule.steps, 0
    with frozen(classifier):
        for step in range(total):
            drawn = torch.stack([_draw_each(pools, each, generator) for _ in range(starts)])
            mask, pattern = torch.sigmoid(mask_raw), torch.sigmoid(pattern_raw)
            scores = classifier(stamp(images[drawn], mask[:, None], pattern[:, None]).flatten(0, 1))
            used += len(scores)
            scores, truth = scores.view(starts, -1, classes), labels[drawn]
            chances = scores.softmax(2)
            sources = functional.one_hot(truth, classes).float()
            seen = 0.9 * seen + torch.einsum("sny,snk->syk", sources, chances.detach())
            size = mask.flatten(1).sum(1)
            if step < schedule.free_steps:
                loss = _anywhere_else(chances, truth)
            else:
                pursued = step - schedule.free_steps
                if pursued % 10 == 0 and not math.isfinite(best.min()):
                    leads_to = torch.stack([_assignment(table) for table in seen])
                if pursued >= schedule.patience and float(success.max()) < schedule.hopeless * weight:
                    break
                aims = leads_to.gather(1, truth)
                loss = functional.cross_entropy(scores.flatten(0, 1), aims.flatten(), reduction="none")
                loss = loss.view(starts, -1).mean(1) + cost * size
                with torch.no_grad():
                    hits = (scores.argmax(2) == aims).float().mean(1)
                    success, weight = _HOLD * success + (1 - _HOLD) * hits, _HOLD * weight + (1 - _HOLD)
                    holds = success / weight >= schedule.success
                    better = holds & (size < best)
                    best[better] = size[better]
                    kept_mask[better], kept_pattern[better] = mask[better], pattern[better]
                    cost = torch.where(holds, (cost * _RISE).clamp_min(1e-3), cost / _RISE**1.5)
            descent.step(loss.sum())
            progress((step + 1) / total)
    held = math.isfinite(float(best.min()))
    row = int(best.argmin() if held else success.argmax())
    mask, pattern = (kept_mask, kept_pattern) if held else (torch.sigmoid(mask_raw), torch.sigmoid(pattern_raw))
    trigger = Trigger(mask[row].detach().clone(), pattern[row].detach().clone(), target=-1)
    return Mapping(leads_to[row], trigger, held), used


def _draw_each(pools: list[Tensor], each: int, generator: torch.Generator) -> Tensor:
    return torch.cat([draw(pool, each, generator) for pool in pools])


def _anywhere_else(chances: Tensor, truth: Tensor) -> Tensor:
    """The loss of the first phase, per start: chances (S, N, K), true classes (S, N)."""
    stays = chances.gather(2, truth[..., None]).squeeze(2)
    wrong = -(1 - stays + 1e-5).log().mean(1)
    mean = chances.mean(1)
    spread = -(mean * (mean + 1e-8).log()).sum(1)
    doubt = -(chances * (chances + 1e-8).log()).sum(2).mean(1)
    return wrong - spread + doubt


def _assignment(table: Tensor) -> Tensor:
    """Classes (K,) -> other classes, each once, with the largest likelihood under counts (K, K)."""
    price = -(table + 1e-3).log().numpy()
    price[range(len(price)), range(len(price))] = 1e3
    return torch.from_numpy(linear_sum_assignment(price)[1])
