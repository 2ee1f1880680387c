"""Arithmetic on sizes, and the checks that an export leaves behind."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from backdoorscan.formats.building.batch import holds
from backdoorscan.formats.pt2.calls import DYNAMIC, NodeCall

CHECKS = {
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


def _size(call: NodeCall) -> int:
    shape = call.operand("self").shape
    return shape[call.axis("dim", len(shape))]


def _arithmetic(function: Callable[..., Any]) -> Callable[[NodeCall], Any]:
    def run(call: NodeCall) -> Any:
        numbers = list(call.arguments.values())
        if len(numbers) not in (1, 2) or not all(isinstance(number, int | float) for number in numbers):
            raise call.unsupported("It does not work with sizes.")
        result = function(*numbers)
        if not isinstance(result, bool) and any(isinstance(n, int) and holds(n) for n in numbers):
            whole = isinstance(result, int) and (holds(result) or result == 0)
            if not whole:
                raise call.unsupported("It computes with the number of images.", DYNAMIC)
        return result

    return run


PLAIN: Mapping[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
}
OPERATORS: Mapping[str, Callable[[NodeCall], Any]] = {
    "torch.ops.aten.sym_size.int": _size,
    **{target: _arithmetic(function) for target, function in PLAIN.items()},
}
