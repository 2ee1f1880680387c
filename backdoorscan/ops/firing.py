"""Whether a place in a graph is a gate: shut on ordinary images, opened by an image that can be solved for.

The proof is in what the network says: images that open the gate get a label that the same images do not get when the
gate alone is held at rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, fx

from backdoorscan.classifier import Classifier
from backdoorscan.ops.relaxing import Relaxed
from backdoorscan.ops.resting import Gate, answer, recorded, same
from backdoorscan.trigger import Trigger, stamp

_MOST = 0.75
"""Part of the images that an open gate has to bring to another label, and to one label for it to be a target."""

_LARGEST = 0.5
"""Part of the image's area up to which what opens a gate is a trigger that can be stamped on others."""

_STEPS = 80
_MOST_COORDINATES = 32


@dataclass(frozen=True)
class Effect:
    """What a network says when a gate is open.

    Attributes:
        target: The label most images get.
        constant: The part of the images that get it.
        overturned: The part of the images that get another label than with the gate held at rest.
        images: How many images.
        trigger: What opens the gate on any image, or ``None``.
    """

    target: int
    constant: float
    overturned: float
    images: int
    trigger: Trigger | None = None

    @property
    def proves(self) -> bool:
        """Whether the gate decides what the network says."""
        return self.overturned >= _MOST


def _at_rest(gate: Gate, gates: Iterable[Gate]) -> dict[fx.Node, Tensor]:
    """What holds a gate shut, and all others; but for faint branches, whose value is an image's own."""
    return {other.node: other.rest for other in gates if other is gate or other.decides or other.node in other.shut}


def force(classifier: Classifier, gate: Gate, gates: Iterable[Gate], images: Tensor) -> Effect:
    """What the network says if the gate were open, whether or not an image can open it."""
    scale = float(torch.stack([answer(classifier, image) for image in images.split(1)]).abs().max())
    rest = gate.rest
    if rest.dtype == torch.bool:
        tried = [~rest]
    elif rest.is_floating_point():
        tried = [rest + size for size in (1.0, 100 * (1 + scale), -100 * (1 + scale))]
    else:
        tried = [rest + 1, 1 - rest]
    held = _at_rest(gate, gates)
    effects = [_effect(classifier, list(images.split(1)), held, {**held, gate.node: value}) for value in tried]
    return max(effects, key=lambda effect: (effect.overturned, effect.constant))


def fire(
    classifier: Classifier, gate: Gate, gates: Iterable[Gate], images: Tensor, starts: Tensor
) -> tuple[Effect | None, int]:
    """Look for an image that opens the gate, and say what the network makes of it.

    Args:
        classifier: The network.
        gate: The gate.
        gates: All gates: with these at rest the network is an ordinary one.
        images: Ordinary images (N, C, H, W) in [0, 1].
        starts: Images (M, C, H, W) to search from.

    Returns:
        What was seen, or ``None`` where no image was found; and how many images were run forward and backward.
    """
    held = _at_rest(gate, gates)
    solver = Solver(classifier, gate)
    # A faint branch adds up over a whole image, as any layer does: there only a mark on other images is a proof.
    faint = not gate.decides and gate.node not in gate.shut
    seen: Effect | None = None
    for objective in solver.objectives(starts[:1]):
        for start in starts.split(1):
            solved = solver.solve(start, objective)
            if solved is None or (faint and float(solved[1].float().mean()) > _LARGEST):
                return seen, solver.samples
            opened = next((image for image in _rounded(*solved) if solver.opens(image)), None)
            if opened is None:
                continue
            effect = _stamped(classifier, opened, solved[1], images, held)
            if not faint and (effect is None or not effect.proves):
                effect = _each(classifier, solver, objective, images, held)
            if effect is not None and (seen is None or effect.overturned > seen.overturned):
                seen = effect
            if seen is not None and seen.proves:
                return seen, solver.samples
    return seen, solver.samples


Objective = Callable[[Tensor], Tensor]
"""From the relaxed value of a gate to a loss."""


class Solver:
    """Solves for images that open one gate.

    Args:
        classifier: The network.
        gate: The gate.

    Attributes:
        samples: Images run forward and backward so far.
    """

    def __init__(self, classifier: Classifier, gate: Gate) -> None:
        self.classifier = classifier
        self.gate = gate
        self.relaxed = Relaxed(classifier.graph_module, gate.node, gate.shut)
        self.samples = 0

    def objectives(self, start: Tensor) -> Iterator[Objective]:
        """What to lessen, most promising first."""
        rest = self.gate.rest
        if rest.dtype == torch.bool:
            wanted = torch.where(rest, -1.0, 1.0)
            if rest.numel() > 1:  # first one of many, the one that is nearest
                yield lambda value: torch.relu(1e-7 - (wanted * value).max()) ** 2
            yield lambda value: (torch.relu(1e-7 - wanted * value) ** 2).sum()
            return
        yield lambda value: -value.sum()
        yield lambda value: value.sum()
        value = self._value(start.clone())
        if value is None or value.numel() < 2:
            return
        for place in range(min(value.numel(), _MOST_COORDINATES)):
            yield lambda value, place=place: value.sum() - 2 * value.flatten()[place]  # type: ignore[misc]
            yield lambda value, place=place: value.flatten()[place]  # type: ignore[misc]

    def _value(self, image: Tensor) -> Tensor | None:
        try:
            with torch.enable_grad():
                value = self.relaxed.value(self.classifier.native(image.requires_grad_()))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None  # margins do not go through every operation as its own values do
        return value if isinstance(value, Tensor) and value.requires_grad else None

    def solve(self, start: Tensor, objective: Objective) -> tuple[Tensor, Tensor] | None:
        """An image (1, C, H, W) in [0, 1] with a small loss, and which pixels (1, H, W) mattered on the way.

        ``None`` where no gradient leads from the gate to the image.
        """
        if self._value(start.clone()) is None:
            return None
        touched = torch.zeros(start.shape[2:], dtype=torch.bool)
        scale = 0.0

        def loss(flat: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, np.ndarray[Any, np.dtype[np.float64]]]:
            nonlocal scale
            image = torch.from_numpy(flat).float().view_as(start)
            value = self._value(image)
            if value is None:
                return 0.0, np.zeros_like(flat)
            with torch.enable_grad():
                result = objective(value)
                (gradient,) = torch.autograd.grad(result, image)
            self.samples += 1
            gradient = gradient.nan_to_num()
            touched.logical_or_((gradient != 0).any(1)[0])
            scale = scale or float(gradient.norm()) or 1.0
            return result.item() / scale, gradient.flatten().double().numpy() / scale

        found = scipy.optimize.minimize(
            loss,
            start.flatten().double().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, 1.0)] * start.numel(),
            options={"maxiter": _STEPS, "ftol": 1e-30, "gtol": 1e-30},
        )
        return torch.from_numpy(found.x).float().view_as(start), touched[None]

    def opens(self, image: Tensor) -> bool:
        """Whether the gate is not at rest on an image."""
        value = recorded(self.classifier, image, {self.gate.node})[self.gate.node]
        return not same(value, self.gate.rest)


def _rounded(image: Tensor, touched: Tensor) -> Iterator[Tensor]:
    """The image as it is, and with its values rounded to what a condition may ask for exactly."""
    yield image
    for steps in (255, 10, 100, 1000):
        yield torch.where(touched, (image * steps).round() / steps, image)


def _stamped(
    classifier: Classifier, opened: Tensor, touched: Tensor, images: Tensor, held: Mapping[fx.Node, Tensor]
) -> Effect | None:
    """What the pixels that opened the gate on one image do on others."""
    mask = touched.float()
    if not 0 < float(mask.mean()) <= _LARGEST:
        return None
    effect = _effect(classifier, list(stamp(images, mask, opened[0]).split(1)), held, {})
    trigger = Trigger(mask, opened[0], effect.target)
    return Effect(effect.target, effect.constant, effect.overturned, effect.images, trigger)


def _each(
    classifier: Classifier, solver: Solver, objective: Objective, images: Tensor, held: Mapping[fx.Node, Tensor]
) -> Effect | None:
    """What the network says of images that were each changed until they open the gate."""
    opened = []
    for image in images[:6].split(1):
        solved = solver.solve(image, objective)
        fit = next((found for found in _rounded(*solved) if solver.opens(found)), None) if solved else None
        if fit is not None:
            opened.append(fit)
    return _effect(classifier, opened, held, {}) if len(opened) > 2 else None


def _effect(
    classifier: Classifier, images: list[Tensor], held: Mapping[fx.Node, Tensor], opened: Mapping[fx.Node, Tensor]
) -> Effect:
    """How labels differ between a network with its gates at rest and with ``opened`` instead of that."""
    quiet = torch.stack([answer(classifier, image, held) for image in images]).argmax(1)
    loud = torch.stack([answer(classifier, image, opened) for image in images]).argmax(1)
    target = int(loud.mode().values)
    others = quiet != target
    constant = float((loud == target).float().mean())
    turned = (loud != quiet)[others] if constant >= _MOST else loud != quiet
    return Effect(target, constant, float(turned.float().mean()) if len(turned) else 0.0, len(images))
