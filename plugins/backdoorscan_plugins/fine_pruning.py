"""The pruning defense of Fine-Pruning: take out the channels that clean images do not use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from backdoorscan import graph, hookimpl
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.errors import MethodError, UnknownNameError, UsageError
from backdoorscan.findings import Finding
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import accuracy
from backdoorscan.ops.training import fine_tune, shuffled
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.repairer import Candidate, Repairer

_CACHE_BYTES = 2**30
"""Most memory for stored activations; beyond it a sample of the images has to do."""


@dataclass(frozen=True, kw_only=True)
class Prune(Repairer):
    """Removes the channels of the last convolution that clean images activate least.

    Backdoors often live in channels that stay dormant on clean images. The channels of the last convolution before
    the dense head are removed in increasing order of their mean activation over the clean images (measured behind
    normalisation, activation function and pooling), and the clean accuracy is measured after each. The repaired
    network B′ is the one at the first point where the accuracy has dropped by at least X percentage points. Each B′
    also gives a GoodNet: the class where B and B′ agree, else N, "this input is backdoored".

    By itself it is a weak defense where backdoor and clean classes share channels: on the published CSAW face network
    the attack survives a drop of 4 points almost untouched.
    """

    id = "prune"
    paper = (
        "Liu, Dolan-Gavitt, Garg: Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks. "
        "RAID 2018, section 3.1"
    )

    held_out = 0.0

    drop: tuple[float, ...] = option(
        (2.0, 4.0, 10.0),
        help="Stop where the clean accuracy has dropped by X percentage points.",
        minimum=0,
        maximum=100,
    )
    channels: tuple[int, ...] = option((), help="Remove this many channels instead, whatever the accuracy.", minimum=1)
    layer: str = option("", help="The convolution to prune; the last one before the dense head if empty.")

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate per drop or number of channels, from a single sweep."""
        sweep = _Sweep(classifier, images, self.layer)

        def candidate(name: str, count: int, **facts: float) -> Candidate:
            shared = {"layer": sweep.layer, "channels": len(sweep.order), "channels_pruned": count}
            return Candidate(name, sweep.pruned(count), {**shared, **facts}, goodnet=True)

        if self.channels:
            if max(self.channels) > len(sweep.order):
                raise UsageError(
                    f"{self.id}.channels = {max(self.channels)} is too many.",
                    why=f"{sweep.layer} has {len(sweep.order)} channels.",
                )
            return [candidate(f"channels={count}", count) for count in sorted(set(self.channels))]

        wanted, candidates = sorted(set(self.drop)), []
        for count, drop in sweep.drops():
            # Accuracies are counts over the number of images: the tolerance only absorbs rounding.
            while wanted and drop >= wanted[0] - 1e-9:
                candidates.append(candidate(f"X={wanted[0]:g}", count, drop=wanted.pop(0)))
            context.progress(count / len(sweep.order))
            if not wanted:
                return candidates
        raise UsageError(
            f"{self.id}.drop = {wanted[0]:g} cannot be reached.",
            why=f"Without any channel of {sweep.layer} the accuracy has dropped by {drop:.1f} points.",
            hint="Ask for a smaller drop or another --layer.",
        )


@dataclass(frozen=True, kw_only=True)
class FinePrune(Repairer):
    """Prunes dormant channels up to an accuracy budget, then fine-tunes on clean images.

    The whole Fine-Pruning defense. Pruning takes out the channels that clean images do not use, fine-tuning wins back
    the accuracy and moves the remaining weights away from the backdoor. The fine-tuning is what defeats a
    pruning-aware attacker, who trains the backdoor into channels that clean images use; it does so only as far as
    clean images change the weights, so triggers that share features with clean classes often survive.
    """

    id = "fine-prune"
    paper = (
        "Liu, Dolan-Gavitt, Garg: Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks. "
        "RAID 2018, section 3.3"
    )
    auto = ({},)

    budget: float = option(4.0, help="Prune while the clean accuracy drops by less, in points.", minimum=0, maximum=100)
    layer: str = option("", help="The convolution to prune; the last one before the dense head if empty.")
    epochs: int = option(10, help="Epochs of fine-tuning.", minimum=0)
    batch_size: int = option(32, help="Images per step.", minimum=2)
    rate: float = option(0.01, help="Size of a step relative to the size of the weights.", minimum=1e-6, maximum=1)

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        """One candidate."""
        sweep = _Sweep(classifier, images, self.layer)
        pruned = 0
        for count, drop in sweep.drops():
            if drop > self.budget:
                break
            pruned = count
        repaired = sweep.pruned(pruned)
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        order = shuffled(len(pixels), self.batch_size, context.generator(self.id))
        used = fine_tune(
            repaired,
            ((pixels[index], labels[index]) for index in order),
            self.epochs * -(-len(pixels) // self.batch_size),
            self.rate,
            after_step=lambda: sweep.silence(repaired, pruned),
            progress=context.progress,
        )
        facts = {"layer": sweep.layer, "channels": len(sweep.order), "channels_pruned": pruned}
        return [Candidate("fine-pruned", repaired, {**facts, "gradient_samples": used})]


class _Sweep:
    """The channels of one convolution in the order in which clean images use them less."""

    def __init__(self, classifier: Classifier, images: LabelledImages, layer: str) -> None:
        network = classifier.graph_module
        if layer and layer not in graph.conv_names(network):
            raise UnknownNameError("convolution", layer, graph.conv_names(network))
        conv = _existing(network, layer) if layer else graph.last_conv_node(network)
        self.classifier = classifier
        self.layer = str(conv.target)
        path = graph.channel_path(network, conv, classifier.example())
        front, self._rest = graph.split(network, path[-1])
        self._stored, self._labels = _activations(classifier, front, images)
        self.order = torch.argsort(self._stored[0].double().mean((0, 2, 3)), stable=True).tolist()

    def drops(self) -> Iterator[tuple[int, float]]:
        """How far the clean accuracy has dropped, in points, with 1, 2, ... channels removed."""
        silent = _silenced_value(self.classifier, self.layer)
        base = _accuracy(self.classifier, self._rest, self._stored, self._labels)
        for count, channel in enumerate(self.order, start=1):
            self._stored[0][:, channel] = silent[:, channel]
            left = _accuracy(self.classifier, self._rest, self._stored, self._labels)
            yield count, 100 * (base - left)

    def pruned(self, count: int) -> Classifier:
        """A copy of the network without the first ``count`` channels."""
        repaired = self.classifier.clone()
        self.silence(repaired, count)
        return repaired

    def silence(self, classifier: Classifier, count: int) -> None:
        """Remove the first ``count`` channels, in place."""
        network = classifier.graph_module
        path = graph.channel_path(network, _existing(network, self.layer), classifier.example())
        graph.remove_channels(network, path, self.order[:count])


def _existing(network: fx.GraphModule, name: str) -> fx.Node:
    node = graph.find_layer(network, name)
    if node is None:
        raise MethodError(f"The network has no layer {name}.")
    return node


@torch.no_grad()
def _activations(classifier: Classifier, front: fx.GraphModule, images: LabelledImages) -> tuple[list[Tensor], Tensor]:
    """What ``front`` returns for all images (or as many as fit), and their labels."""
    size = sum(value.numel() * value.element_size() for value in front(classifier.example()))
    images = images.sample(max(1, _CACHE_BYTES // size), seed=0)
    batches = (to_tensor(images.pixels[start : start + 256]) for start in range(0, len(images), 256))
    parts = [front(classifier.native(batch)) for batch in batches]
    return [torch.cat(values) for values in zip(*parts, strict=True)], torch.from_numpy(images.labels)


@torch.no_grad()
def _silenced_value(classifier: Classifier, name: str) -> Tensor:
    """What the channels' activations are once they are removed: shape (1, C, H, W), zero for most networks."""
    twin = classifier.clone().graph_module
    conv = _existing(twin, name)
    path = graph.channel_path(twin, conv, classifier.example())
    module = graph.layer(twin, conv)
    if not isinstance(module, torch.nn.Conv2d):
        raise MethodError(f"{name} is not a convolution.")
    graph.remove_channels(twin, path, range(module.out_channels))
    return graph.values(twin, classifier.example(), [path[-1]])[path[-1]]


@torch.no_grad()
def _accuracy(classifier: Classifier, rest: fx.GraphModule, stored: Sequence[Tensor], labels: Tensor) -> float:
    chunks = zip(*(value.split(1024) for value in stored), strict=True)
    return accuracy(torch.cat([classifier.class_scores(rest(*chunk)).argmax(1) for chunk in chunks]), labels)


@hookimpl
def backdoorscan_repairers() -> Sequence[type[Repairer]]:
    """The methods of this module."""
    return [Prune, FinePrune]
