"""How the graph of a classifier begins, with its images, and ends, with their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.building.batch import BATCH, shown
from backdoorscan.formats.building.values import Origin, Value
from backdoorscan.plugin.loader import Layout


@dataclass(frozen=True)
class BuiltNetwork:
    """A network and where its tensors came from.

    Attributes:
        network: In eval mode; takes images channels first.
        size: Shape of the images it was built for, in the file's order of axes.
        layout: The file's order of axes.
        num_classes: K.
        origins: For every tensor that the file stores: its name in the network, and where it is in the file.
        nodes: The nodes that compute the file's values, by the values' names.
    """

    network: fx.GraphModule
    size: tuple[int, ...]
    layout: Layout
    num_classes: int
    origins: Mapping[str, Origin]
    nodes: Mapping[str, fx.Node]

    @classmethod
    def of(
        cls,
        network: fx.GraphModule,
        size: tuple[int, ...],
        layout: Layout,
        num_classes: int,
        origins: Mapping[str, Origin],
        values: Mapping[str, object],
    ) -> BuiltNetwork:
        """A finished network, with the origins and values of what is left in it."""
        live, stored = set(network.graph.nodes), network.state_dict().keys()
        return cls(
            network=network,
            size=size,
            layout=layout,
            num_classes=num_classes,
            origins={name: origin for name, origin in origins.items() if name in stored},
            nodes={name: v.node for name, v in values.items() if isinstance(v, Value) and v.node in live},
        )


def add_images(graph: fx.Graph, size: tuple[int, ...], layout: Layout) -> tuple[fx.Node, Value]:
    """Begin a graph: its input, channels first, and the images as the file takes them.

    Args:
        graph: An empty one.
        size: Shape of one image in the file's order of axes.
        layout: That order.
    """
    entry = graph.placeholder("x")
    image = Value(entry, torch.empty((BATCH, *size), device="meta"))
    if layout == "NHWC":
        first = Value(entry, image.meta.permute(0, 3, 1, 2))
        order = (0, 2, 3, 1)
        image = Value(graph.call_function(torch.permute, (entry, order)), image.meta, (first, order))
    return entry, image


def add_scores(graph: fx.Graph, scores: object, hint: str) -> int:
    """End a graph with a row of scores per image, and return how many are in a row.

    Args:
        graph: The graph.
        scores: What the file returns.
        hint: How to export such a model with an open number of images.

    Raises:
        UnsupportedModelError: It is no row of scores per image.
    """
    if not isinstance(scores, Value):
        raise UnsupportedModelError("The model's scores do not depend on its input.", hint="Do not use this file.")
    row = scores.shape[1:]
    single_axis = len(row) == 1 or (len(row) > 1 and math.prod(row) == max(row))
    if not single_axis or scores.shape[0] != BATCH or not scores.meta.is_floating_point():
        raise UnsupportedModelError(
            f"The model returns values of the shape {shown(scores.shape)}.",
            why="A classifier returns one row of scores per image.",
            hint=f"If it was exported for a fixed number of images, {hint}",
        )
    result = scores.node
    if len(row) > 1:
        result = graph.call_function(torch.flatten, (result, 1))
    graph.output(result)
    return math.prod(row)


def channels_first(shape: tuple[int | None, ...], layout: Layout) -> tuple[int | None, ...]:
    """An image's shape in the order of axes of the network."""
    return (shape[2], shape[0], shape[1]) if layout == "NHWC" else shape
