"""From a network to the bytes of a new exported program."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoorscan.errors import UnsupportedModelError


def export(network: nn.Module, example: Tensor, extra: Mapping[str, str] | None = None) -> bytes:
    """Export a network with an open batch.

    The same network gives the same bytes, and nothing in them tells of the machine they were made on.

    Args:
        network: Takes a tensor ``(N, ...)`` and returns one tensor or several.
        example: At least two inputs; only their shape and type matter.
        extra: Texts to store beside the program, by name.

    Raises:
        UnsupportedModelError: ``torch.export`` cannot follow the network.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except Exception as error:  # whatever the network's own code and the exporter's may raise
        raise UnsupportedModelError(
            "The network cannot be exported as a .pt2 file.",
            why=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            hint="Write it in its own format instead.",
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                # Where in the sources each node comes from, with paths of this machine.
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                    node.meta.pop(key, None)
    # Example inputs are stored as a pickle, for which no reader of ours has a use.
    program._example_inputs = None
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files=dict(extra or {}))
    return buffer.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice to its own developers from users."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
