"""The table of operators: one small function for each, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from backdoorscan.formats.building.values import Operand
from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.operators import (
    activations,
    arithmetic,
    constants,
    control,
    convolution,
    dense,
    indexing,
    normalization,
    pooling,
    resizing,
    shaping,
    single,
)

_OPERATORS: Mapping[str, Callable[[NodeCall], Operand | Sequence[Operand]]] = {
    **activations.OPERATORS,
    **arithmetic.OPERATORS,
    **constants.OPERATORS,
    **control.OPERATORS,
    **convolution.OPERATORS,
    **dense.OPERATORS,
    **indexing.OPERATORS,
    **normalization.OPERATORS,
    **pooling.OPERATORS,
    **resizing.OPERATORS,
    **shaping.OPERATORS,
}
_REPEATING = {"Loop", "Scan", "SequenceMap"}


def run_operator(call: NodeCall) -> Sequence[Operand]:
    """Add one node to the graph and return its outputs.

    Raises:
        UnsupportedModelError: There is no exact equivalent.
    """
    node = call.node
    if node.op in _REPEATING and not node.domain:
        raise call.unsupported(
            "It repeats a part of the network as often as the data says. Classifiers of images have no need of that, "
            "and a backdoor can hide there that no gradient finds.",
            "Ask the publisher for a network without loops; do not trust this one unseen.",
        )
    function = None if node.domain else _OPERATORS.get(node.op)
    if function is None:
        where = f"the domain '{node.domain[:100]}'" if node.domain else "ONNX"
        raise call.unsupported(f"This reader has no equivalent for the operator '{node.op[:100]}' of {where}.")
    result: Operand | Sequence[Operand] | None
    if node.op != "If" and any(map(single.is_single, call.operands)):
        result = single.run_single(call)
        if result is None:
            raise call.unsupported("It works on a value that the file computes for a whole batch.")
    else:
        result = function(call)
    return result if isinstance(result, list | tuple) else [result]  # type: ignore[list-item]
