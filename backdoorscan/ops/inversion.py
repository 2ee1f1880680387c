"""Trigger inversion: the smallest trigger that sends clean images to a label, for many labels at once.

Source: Wang et al. 2019, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", section IV.
For a label t it minimises, over a mask m and a pattern p,

    CE(f((1 - m) x + m p), t) + cost · ‖m‖₁

and adapts ``cost`` so that the success rate stays at a threshold while the mask shrinks. Here the labels, and several
starts of each, are rows of one batch: one forward and backward pass serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from backdoorscan.classifier import Classifier
from backdoorscan.ops.searching import Descent, draw, frozen
from backdoorscan.trigger import Trigger, stamp


@dataclass(frozen=True)
class Schedule:
    """How long to search and how to adapt the cost.

    The original's schedule is ``steps=1000, batches=31, batch_size=32, smoothing=0, patience=5, cost_multiplier=2,
    attack_success_threshold=0.99, learning_rate=0.1``.

    Attributes:
        steps: Steps of the cost schedule, at most.
        batches: Gradient steps within one step of the schedule.
        batch_size: Images per label and gradient step.
        learning_rate: Of Adam, with betas (0.5, 0.9).
        restarts: Independent starts per label; the best one counts.
        screening: Steps after which only the best start of each label goes on.
        init_cost: Weight of the L1 term when it sets in.
        cost_multiplier: Factor by which the cost rises; it falls by its power 1.5.
        patience: Steps in a row above (below) the threshold before the cost rises (falls).
        attack_success_threshold: Success rate to hold, 0 to 1.
        smoothing: Weight of the past in the success rate, 0 to below 1; small batches need it.
        early_stop_threshold: A step counts as progress if it brings the L1 norm under this part of the best.
        early_stop_patience: Steps without progress before a label is done, once its cost has risen and fallen.
    """

    steps: int
    batches: int
    batch_size: int
    learning_rate: float
    restarts: int
    screening: int
    init_cost: float
    cost_multiplier: float
    patience: int
    attack_success_threshold: float
    smoothing: float
    early_stop_threshold: float
    early_stop_patience: int


@dataclass(frozen=True)
class Inversion:
    """What the search found for one label.

    Attributes:
        trigger: The smallest trigger that held the threshold; where none did, the last one tried.
        succeeded: Whether any did.
        steps: Schedule steps used.
        loss: Cross-entropy after each step.
        l1: L1 norm of the mask after each step, pixels.
        success: Success rate in each step, 0 to 1.
    """

    trigger: Trigger
    succeeded: bool
    steps: int
    loss: Sequence[float]
    l1: Sequence[float]
    success: Sequence[float]


def invert(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[int],
    schedule: Schedule,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda _: None,
    starts: Sequence[Trigger] = (),
    sources: Sequence[int] = (),
    bystanders: int = 0,
) -> tuple[list[Inversion], int]:
    """Search a trigger for each target label.

    Args:
        classifier: Its parameters are left without gradients while it runs.
        images: Shape (N, C, H, W) in [0, 1].
        labels: Shape (N,); images of a target's own class are not used for it.
        targets: Labels to search; each needs at least one image of another class.
        schedule: See ``Schedule``.
        generator: All random numbers come from it.
        progress: Told the part done, 0 to 1.
        starts: Triggers to go on from, one per target, in place of random ones; then ``schedule.restarts`` is 1.
        sources: The class whose images each target is searched for; without any, images of all other classes.
        bystanders: Images of further classes per label and step that have to keep their label under the trigger.

    Returns:
        One result per target, in their order, and the gradient samples used.

    Raises:
        ValueError: A target has no image of another class.
    """
    rows = torch.tensor(targets).repeat_interleave(schedule.restarts)
    chosen_images = [labels == source for source in sources] or [labels != target for target in targets]
    pools = [mask.nonzero().flatten() for mask in chosen_images]
    apart = [
        (~mask & (labels != target)).nonzero().flatten() for mask, target in zip(chosen_images, targets, strict=True)
    ]
    per_row = schedule.batch_size + bystanders
    for target, pool in zip(targets, pools, strict=True):
        if len(pool) == 0:
            raise ValueError(f"no image to search a trigger for label {target} with")
    channels, height, width = classifier.input_shape
    # Half-transparent everywhere at the start: every pixel then has a say in where the mask goes.
    mask_raw = torch.randn(len(rows), 1, height, width, generator=generator) - 1
    pattern_raw = torch.randn(len(rows), channels, height, width, generator=generator)
    if starts:
        # Short of 0 and 1, where a sigmoid has no slope left.
        mask_raw = torch.stack([start.mask for start in starts]).logit(eps=0.01)
        pattern_raw = torch.stack([start.pattern for start in starts]).logit(eps=0.01)
    mask_raw, pattern_raw = mask_raw.requires_grad_(), pattern_raw.requires_grad_()
    descent = Descent([mask_raw, pattern_raw], schedule.learning_rate)

    state = CostState(len(rows), schedule)
    best_mask, best_pattern = torch.zeros_like(mask_raw), torch.zeros_like(pattern_raw)
    curves: list[tuple[Tensor, Tensor, Tensor]] = []
    gradient_samples = 0
    with frozen(classifier):
        for step in range(schedule.steps):
            if step == schedule.screening:
                state.keep_best_starts()
            active = state.active.nonzero().flatten()
            if len(active) == 0:
                break
            aims = rows[active]
            loss, hits = torch.zeros(len(active)), torch.zeros(len(active))
            for _ in range(schedule.batches):
                own = [row // schedule.restarts for row in active.tolist()]
                chosen = torch.stack([draw(pools[at], schedule.batch_size, generator) for at in own])
                if bystanders:
                    chosen = torch.cat([chosen, torch.stack([draw(apart[at], bystanders, generator) for at in own])], 1)
                mask, pattern = torch.sigmoid(mask_raw[active]), torch.sigmoid(pattern_raw[active])
                stamped = stamp(images[chosen], mask[:, None], pattern[:, None])
                logits = classifier(stamped.flatten(0, 1))
                wanted = labels[chosen]
                wanted[:, : schedule.batch_size] = aims[:, None]
                wanted = wanted.flatten()
                entropies = functional.cross_entropy(logits, wanted, reduction="none").view(-1, per_row)
                entropy = entropies[:, : schedule.batch_size].mean(1)
                if bystanders:
                    entropy = entropy + entropies[:, schedule.batch_size :].mean(1)
                size = mask.flatten(1).sum(1)
                descent.step((entropy + state.cost[active] * size).sum())
                loss += entropy.detach() / schedule.batches
                right = (logits.argmax(1) == wanted).float().view(-1, per_row)
                hits += right.mean(1) / schedule.batches
                gradient_samples += len(wanted)
            l1 = size.detach()
            improved = active[state.update(active, hits, l1)]
            with torch.no_grad():
                kept = torch.isin(active, improved)
                best_mask[improved], best_pattern[improved] = mask[kept].detach(), pattern[kept].detach()
            curves.append(tuple(_spread(active, value, len(rows)) for value in (loss, l1, hits)))  # type: ignore[arg-type]
            progress((step + 1) / schedule.steps)

    last_mask, last_pattern = torch.sigmoid(mask_raw).detach(), torch.sigmoid(pattern_raw).detach()
    losses, sizes, successes = (torch.stack(series) for series in zip(*curves, strict=True))
    results = []
    for position, target in enumerate(targets):
        of_target = torch.arange(position * schedule.restarts, (position + 1) * schedule.restarts)
        row = int(of_target[state.best[of_target].argmin()])
        succeeded = math.isfinite(float(state.best[row]))
        masks, patterns = (best_mask, best_pattern) if succeeded else (last_mask, last_pattern)
        used = int(torch.isfinite(losses[:, row]).sum())
        results.append(
            Inversion(
                trigger=Trigger(masks[row].detach().clone(), patterns[row].detach().clone(), target),
                succeeded=succeeded,
                steps=used,
                loss=losses[:used, row].tolist(),
                l1=sizes[:used, row].tolist(),
                success=successes[:used, row].tolist(),
            )
        )
    return results, gradient_samples


class CostState:
    """The cost schedule of every row: Wang et al.'s, with a smoothed success rate."""

    def __init__(self, rows: int, schedule: Schedule) -> None:
        self.schedule = schedule
        self.active = torch.ones(rows, dtype=torch.bool)
        self.cost = torch.zeros(rows)
        self.best = torch.full((rows,), math.inf)
        self._success = torch.zeros(rows)
        self._weight = torch.zeros(rows)
        self._above = torch.zeros(rows, dtype=torch.long)
        self._below = torch.zeros(rows, dtype=torch.long)
        self._rose = torch.zeros(rows, dtype=torch.bool)
        self._fell = torch.zeros(rows, dtype=torch.bool)
        self._progress_mark = torch.full((rows,), math.inf)
        self._stale = torch.zeros(rows, dtype=torch.long)

    def keep_best_starts(self) -> None:
        """End all starts of a label but the one with the smallest trigger, or the most successful one without any."""
        # Where no start succeeded all sizes are infinite, and a success rate below 1 decides.
        rank = torch.where(torch.isfinite(self.best), self.best, 1e6 * (2 - self._success)).view(
            -1, self.schedule.restarts
        )
        others = torch.ones_like(rank, dtype=torch.bool).scatter_(1, rank.argmin(1, keepdim=True), False)
        self.active[others.flatten()] = False

    def update(self, active: Tensor, hits: Tensor, l1: Tensor) -> Tensor:
        """Take in one step of the active rows; returns which of them (positions) found a smaller trigger."""
        schedule = self.schedule
        past = schedule.smoothing
        self._success[active] = past * self._success[active] + (1 - past) * hits
        self._weight[active] = past * self._weight[active] + (1 - past)
        holds = self._success[active] / self._weight[active] >= schedule.attack_success_threshold
        improved = holds & (l1 < self.best[active])
        self.best[active[improved]] = l1[improved]

        above = torch.where(holds, self._above[active] + 1, 0)
        below = torch.where(holds, 0, self._below[active] + 1)
        cost = self.cost[active]
        unset = cost == 0
        rise, fall = above >= schedule.patience, (below >= schedule.patience) & ~unset
        start = torch.full_like(cost, schedule.init_cost)
        cost = torch.where(rise, torch.where(unset, start, cost * schedule.cost_multiplier), cost)
        cost = torch.where(fall, cost / schedule.cost_multiplier**1.5, cost)
        self.cost[active] = cost
        # The step at which the cost sets in counts towards its first rise.
        self._above[active] = torch.where(rise, unset.long(), above)
        self._below[active] = torch.where(fall, 0, below)
        self._rose[active] |= rise & ~unset
        self._fell[active] |= fall

        mark = self._progress_mark[active]
        progressed = self.best[active] < schedule.early_stop_threshold * mark
        self._progress_mark[active] = torch.where(progressed, self.best[active], mark)
        self._stale[active] = torch.where(progressed, 0, self._stale[active] + 1)
        settled = self._rose[active] & self._fell[active]
        self.active[active[settled & (self._stale[active] >= schedule.early_stop_patience)]] = False
        return improved.nonzero().flatten()


def _spread(active: Tensor, values: Tensor, rows: int) -> Tensor:
    """The active rows' values in a tensor of all rows, NaN elsewhere."""
    full = torch.full((rows,), math.nan)
    full[active] = values
    return full
