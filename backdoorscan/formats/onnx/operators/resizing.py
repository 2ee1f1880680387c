"""Enlarging and shrinking images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import functional

from backdoorscan.formats.building.values import Const, Operand
from backdoorscan.formats.onnx.calls import NodeCall

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


def _scales(call: NodeCall) -> list[float]:
    if call.opset < 9:
        found = call.node.attributes.get("scales")
        return list(found.floats) if found is not None else []
    for index in (1,) if call.opset < 11 else (2,):
        if call.optional(index) is not None:
            scales: list[float] = call.constant(index).tensor.reshape(-1).tolist()
            return scales
    return []


def _resize(call: NodeCall) -> Operand:
    operand = call.operand(0)
    rank = len(operand.shape)
    scales, sizes = _scales(call), call.numbers(3) if call.opset >= 11 else None
    if call.integers("axes") not in (None, list(range(rank))) or isinstance(operand, Const) or rank not in _LINEAR:
        raise call.unsupported("It resizes other axes than those of an image.")
    if call.text("keep_aspect_ratio_policy", "stretch") != "stretch" or call.integer("antialias", 0):
        raise call.unsupported("It keeps the aspect ratio or smooths.")
    if sizes is None:
        if len(scales) != rank or not all(0 < scale < 1000 for scale in scales):
            raise call.unsupported(f"It scales {rank} axes by {scales[:8]}.")
        sizes = [
            math.floor(size * scale + 1e-6) if axis > 1 else size * round(scale)
            for axis, (size, scale) in enumerate(zip(operand.shape, scales, strict=True))
        ]
    if len(sizes) != rank or sizes[1] != operand.shape[1] or min(sizes) < 1:
        raise call.unsupported(f"It resizes {list(operand.shape[1:])} to {sizes[1:]}.")
    old = call.opset < 11
    places = call.text("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    # Where the file gives factors they count, even if they do not lead to whole sizes.
    change: dict[str, Any] = {"scale_factor": tuple(scales[2:])} if scales else {"size": tuple(sizes[2:])}
    match call.text("mode", "nearest"), places:
        case "nearest", "asymmetric":
            return call.call(functional.interpolate, operand, **change)
        case "nearest", "half_pixel" | "tf_half_pixel_for_nn" | "half_pixel_symmetric":
            return call.call(functional.interpolate, operand, **change, mode="nearest-exact")
        case "linear", "half_pixel" | "pytorch_half_pixel" | "half_pixel_symmetric":
            return call.call(functional.interpolate, operand, **change, mode=_LINEAR[rank], align_corners=False)
        case "linear", "align_corners":
            return call.call(functional.interpolate, operand, **change, mode=_LINEAR[rank], align_corners=True)
        case "cubic", "half_pixel" | "pytorch_half_pixel" if rank == 4:
            return call.call(functional.interpolate, operand, **change, mode="bicubic", align_corners=False)
        case mode, _:
            raise call.unsupported(f"It resizes by '{mode[:40]}' with '{places[:40]}'.")


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {"Resize": _resize, "Upsample": _resize}
