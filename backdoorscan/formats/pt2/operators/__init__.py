"""The closed list of operators: those with a function of their own, and those taken as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backdoorscan.formats.pt2.calls import NodeCall
from backdoorscan.formats.pt2.operators import constants, layers, shaping, sizes
from backdoorscan.formats.pt2.schemas import changes, functional, split_target

_FUNCTIONS: Mapping[str, Callable[[NodeCall], Any]] = {
    **constants.OPERATORS,
    **layers.OPERATORS,
    **shaping.OPERATORS,
}
# Element by element; over axes; products; layers of computed weights; pooling and resizing; positions; decisions.
_PLAIN = """
    abs add addcdiv addcmul clamp clamp_max clamp_min cos celu div elu erf exp expm1 gelu glu hardshrink hardsigmoid
    hardswish hardtanh leaky_relu log log1p log2 log_sigmoid maximum minimum mish mul neg pow prelu reciprocal relu
    relu6 rsqrt rsub selu sigmoid silu sin softplus softshrink softsign sqrt square sub tan tanh threshold
    absolute clip divide multiply negative subtract
    true_divide zeros_like ones_like full_like

    amax amin cumsum linalg_vector_norm log_softmax logsumexp max mean min norm prod softmax std std_mean sum var
    var_mean cosine_similarity

    addmm baddbmm bmm dot einsum matmul mm mv addbmm

    batch_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d convolution group_norm instance_norm
    layer_norm linear rms_norm

    _adaptive_avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d
    constant_pad_nd max_pool1d max_pool2d max_pool2d_with_indices pad reflection_pad2d replication_pad2d
    upsample_bicubic2d upsample_bilinear2d upsample_nearest2d _upsample_nearest_exact2d

    channel_shuffle chunk diagonal embedding expand_as flip gather im2col index index_select movedim pixel_shuffle
    pixel_unshuffle repeat_interleave roll rot90 split split_with_sizes stack swapaxes tensor_split tile transpose
    tril triu unbind unfold view_as reshape_as unsafe_chunk unsafe_split narrow select slice_scatter arange eye
    linspace scalar_tensor one_hot meshgrid fill zero copy _native_batch_norm_legit

    all any argmax argmin argsort bitwise_and bitwise_not bitwise_or bitwise_xor __and__ __or__ __xor__ ceil eq
    floor floor_divide fmod ge gt isfinite isinf isnan le logical_and logical_not logical_or logical_xor lt
    masked_fill ne nan_to_num remainder round scatter scatter_add select_scatter sign sgn sort topk trunc where
    heaviside
"""
_TAKEN = frozenset(_PLAIN.split())
_CONTROL = "torch.ops.higher_order."


def check_operator(call: NodeCall) -> None:
    """Look whether there is an equivalent, before any work.

    Raises:
        UnsupportedModelError: There is none.
    """
    target = call.node.target
    name = _name(target)
    if target.startswith(_CONTROL):
        raise call.unsupported(
            "It runs a part of the program by itself, perhaps chosen by the data, where a backdoor can hide that no "
            "gradient finds.",
            "Ask the publisher for a network without control flow; do not trust this one unseen.",
        )
    if target not in sizes.OPERATORS and not any(name in known for known in (sizes.CHECKS, _FUNCTIONS, _TAKEN)):
        raise call.unsupported(f"This reader has no equivalent for the operator '{target[:100]}'.")


def run_operator(call: NodeCall) -> Sequence[Any]:
    """Add one node, which ``check_operator`` let pass, to the graph and return its outputs.

    Raises:
        UnsupportedModelError: There is no exact equivalent.
    """
    target = call.node.target
    name = _name(target)
    if target in sizes.OPERATORS:
        return [sizes.OPERATORS[target](call)]
    if name in sizes.CHECKS:
        return []
    if changes(target) and not call.varies:
        result = call.in_place()
    elif name in _FUNCTIONS and (call.varies or name in shaping.OPERATORS or name in constants.OPERATORS):
        result = _FUNCTIONS[name](call)
    else:
        result = call.plain()
    return result if isinstance(result, list) else [result]


def _name(target: str) -> str:
    """The operator's name without its overload, and without the mark of working in place."""
    names = split_target(target)
    return functional(names[0]) if names else ""
