"""The table of operators: one small function for each, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.operators import (
    activations,
    arithmetic,
    constants,
    convolution,
    dense,
    indexing,
    normalization,
    pooling,
    resizing,
    shaping,
)
from backdoorscan.formats.onnx.values import Operand

_OPERATORS: Mapping[str, Callable[[NodeCall], Operand | Sequence[Operand]]] = {
    **activations.OPERATORS,
    **arithmetic.OPERATORS,
    **constants.OPERATORS,
    **convolution.OPERATORS,
    **dense.OPERATORS,
    **indexing.OPERATORS,
    **normalization.OPERATORS,
    **pooling.OPERATORS,
    **resizing.OPERATORS,
    **shaping.OPERATORS,
}
_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}


def run_operator(call: NodeCall) -> Sequence[Operand]:
    """Add one node to the graph and return its outputs.

    Raises:
        UnsupportedModelError: There is no exact equivalent.
    """
    node = call.node
    if node.op in _CONTROL_FLOW and not node.domain:
        raise call.unsupported(
            "It chooses by the data which part of the network runs, where a backdoor can hide that no gradient finds.",
            "Ask the publisher for a network without control flow; do not trust this one unseen.",
        )
    function = None if node.domain else _OPERATORS.get(node.op)
    if function is None:
        where = f"the domain '{node.domain[:100]}'" if node.domain else "ONNX"
        raise call.unsupported(f"This reader has no equivalent for the operator '{node.op[:100]}' of {where}.")
    result = function(call)
    return result if isinstance(result, list | tuple) else [result]  # type: ignore[list-item]
