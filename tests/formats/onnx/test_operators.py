"""One operator at a time, in the forms that old and new files give it; onnxruntime says what each means."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def ints(*values):
    return np.array(values, dtype=np.int64)


W, B = normal(4, 3, 3, 2), normal(4)
C3 = normal(3, 1, 1)
POSITIVE = np.abs(normal(3)) + 0.5

# name: (operator, opset, settings, further inputs); the value before it has the shape (N, 3, 6, 5)
CASES = {
    "conv": ("Conv", 11, {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 0]}, [W, B]),
    "conv-asymmetric": ("Conv", 11, {"pads": [0, 1, 2, 0], "dilations": [1, 2]}, [W, B]),
    "conv-upper": ("Conv", 7, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [W]),
    "conv-lower": ("Conv", 11, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [W, B]),
    "conv-valid": ("Conv", 22, {"auto_pad": "VALID"}, [W, B]),
    "conv-grouped": ("Conv", 11, {"group": 3}, [normal(6, 1, 2, 2), normal(6)]),
    "conv-transposed": (
        "ConvTranspose",
        11,
        {"strides": [2, 2], "pads": [1, 0, 1, 0], "output_padding": [1, 0]},
        [normal(3, 2, 3, 2), normal(2)],
    ),
    "batch-norm-7": ("BatchNormalization", 7, {"epsilon": 0.1}, [normal(3), normal(3), normal(3), POSITIVE]),
    "batch-norm-15": ("BatchNormalization", 15, {}, [normal(3), normal(3), normal(3), POSITIVE]),
    "instance-norm": ("InstanceNormalization", 11, {}, [normal(3), normal(3)]),
    "layer-norm": ("LayerNormalization", 17, {"axis": -2}, [normal(6, 5), normal(6, 5)]),
    "layer-norm-broadcast": ("LayerNormalization", 17, {"axis": 1}, [normal(6, 5)]),
    "group-norm": ("GroupNormalization", 21, {"num_groups": 3}, [normal(3), normal(3)]),
    "lrn": ("LRN", 11, {"size": 3, "alpha": 0.3, "bias": 2.0}, []),
    "lp": ("LpNormalization", 11, {"axis": 1, "p": 2}, []),
    "max-pool": ("MaxPool", 10, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0], "ceil_mode": 1}, []),
    "max-pool-asymmetric": ("MaxPool", 7, {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "strides": [2, 2]}, []),
    "max-pool-same": ("MaxPool", 11, {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}, []),
    "average-pool": ("AveragePool", 7, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, []),
    "average-pool-counted": (
        "AveragePool",
        11,
        {"kernel_shape": [3, 3], "pads": [0, 1, 1, 1], "strides": [2, 2], "count_include_pad": 1},
        [],
    ),
    "average-pool-asymmetric": ("AveragePool", 11, {"kernel_shape": [2, 3], "pads": [1, 0, 0, 2]}, []),
    "average-pool-ceil": ("AveragePool", 19, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, []),
    "global-average": ("GlobalAveragePool", 7, {}, []),
    "global-max": ("GlobalMaxPool", 7, {}, []),
    "prelu": ("PRelu", 9, {}, [C3]),
    "prelu-one": ("PRelu", 9, {}, [normal(1)]),
    "prelu-everywhere": ("PRelu", 9, {}, [normal(3, 6, 5)]),
    "leaky": ("LeakyRelu", 7, {"alpha": 0.3}, []),
    "elu": ("Elu", 7, {"alpha": 0.7}, []),
    "celu": ("Celu", 12, {"alpha": 0.7}, []),
    "selu": ("Selu", 7, {"alpha": 1.5, "gamma": 1.2}, []),
    "hard-sigmoid": ("HardSigmoid", 7, {"alpha": 0.3, "beta": 0.4}, []),
    "hard-swish": ("HardSwish", 14, {}, []),
    "thresholded": ("ThresholdedRelu", 10, {"alpha": 0.2}, []),
    "softplus": ("Softplus", 7, {}, []),
    "softsign": ("Softsign", 7, {}, []),
    "gelu": ("Gelu", 20, {"approximate": "tanh"}, []),
    "clip-6": ("Clip", 7, {"min": -0.5, "max": 0.6}, []),
    "clip-11": ("Clip", 13, {}, [np.float32(-0.5), np.float32(0.6)]),
    "clip-max": ("Clip", 13, {}, [None, np.float32(0.6)]),
    "softmax-11": ("Softmax", 11, {"axis": 2}, []),
    "softmax-13": ("Softmax", 13, {"axis": 2}, []),
    "log-softmax": ("LogSoftmax", 9, {}, []),
    "add": ("Add", 7, {}, [C3]),
    "sub": ("Sub", 7, {}, [np.float32(0.3)]),
    "mul": ("Mul", 14, {}, [normal(1, 3, 1, 1)]),
    "div": ("Div", 7, {}, [np.array([2.0], np.float32)]),
    "pow": ("Pow", 13, {}, [np.float32(2)]),
    "pow-3": ("Pow", 13, {}, [np.float32(3)]),
    "max": ("Max", 8, {}, [C3]),
    "mean": ("Mean", 8, {}, [C3]),
    "mod": ("Mod", 13, {"fmod": 1}, [np.float32(0.7)]),
    "floor": ("Floor", 13, {}, []),
    "erf": ("Erf", 9, {}, []),
    "reduce-mean-11": ("ReduceMean", 11, {"axes": [-1, 2], "keepdims": 0}, []),
    "reduce-mean-18": ("ReduceMean", 18, {}, [ints(2, 3)]),
    "reduce-sum-13": ("ReduceSum", 13, {}, [ints(1)]),
    "reduce-max-13": ("ReduceMax", 13, {"axes": [1]}, []),
    "reduce-min-20": ("ReduceMin", 20, {"keepdims": 0}, [ints(-1)]),
    "reduce-l2": ("ReduceL2", 13, {"axes": [3]}, []),
    "reduce-prod": ("ReduceProd", 13, {"axes": [1], "keepdims": 0}, []),
    "reduce-nothing": ("ReduceSum", 13, {"noop_with_empty_axes": 1}, []),
    "matmul": ("MatMul", 9, {}, [normal(5, 4)]),
    "matmul-stacked": ("MatMul", 9, {}, [normal(3, 5, 2)]),
    "einsum": ("Einsum", 12, {"equation": "nchw,wk->nchk"}, [normal(5, 4)]),
    "transpose": ("Transpose", 7, {"perm": [0, 3, 1, 2]}, []),
    "reshape-zero": ("Reshape", 7, {}, [ints(0, 0, -1)]),
    "reshape-one": ("Reshape", 13, {}, [ints(1, 18, 5)]),
    "flatten": ("Flatten", 9, {"axis": 1}, []),
    "unsqueeze-11": ("Unsqueeze", 11, {"axes": [1, -1]}, []),
    "unsqueeze-13": ("Unsqueeze", 13, {}, [ints(2)]),
    "slice-9": ("Slice", 9, {"starts": [1, 0], "ends": [9, -1], "axes": [2, 3]}, []),
    "slice-10": ("Slice", 13, {}, [ints(0, 1), ints(2**31 - 1, 6), ints(0, 2), ints(1, 2)]),
    "slice-flipped": ("Slice", 13, {}, [ints(-1), ints(-99), ints(1), ints(-1)]),
    "gather": ("Gather", 11, {"axis": 1}, [ints(2, -3)]),
    "gather-one": ("Gather", 11, {"axis": 2}, [np.array(-1)]),
    "gather-table": ("Gather", 11, {"axis": 3}, [np.array([[0, 1], [4, 2]])]),
    "pad-2": ("Pad", 9, {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 0.5}, []),
    "pad-reflect": ("Pad", 11, {"mode": "reflect"}, [ints(0, 0, 1, 2, 0, 0, 2, 1)]),
    "pad-edge": ("Pad", 18, {"mode": "edge"}, [ints(1, 2), None, ints(3)]),
    "tile": ("Tile", 13, {}, [ints(1, 2, 1, 3)]),
    "expand": ("Expand", 13, {}, [ints(1, 1, 6, 1)]),
    "upsample-7": ("Upsample", 7, {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 3.0]}, []),
    "upsample-9": ("Upsample", 9, {"mode": "nearest"}, [np.array([1, 1, 2, 2], np.float32)]),
    "resize-linear": ("Resize", 13, {"mode": "linear"}, [None, np.array([1, 1, 2, 1.5], np.float32)]),
    "resize-corners": (
        "Resize",
        13,
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        [None, None, ints(1, 3, 11, 3)],
    ),
    "resize-nearest": (
        "Resize",
        18,
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        [None, np.array([1, 1, 2, 2], np.float32)],
    ),
    "resize-half-pixel": ("Resize", 13, {"mode": "nearest"}, [None, np.array([1, 1, 3, 2], np.float32)]),
    "resize-cubic": ("Resize", 13, {"mode": "cubic"}, [None, np.array([1, 1, 2, 2], np.float32)]),
}  # fmt: skip


def one(written, op, opset, settings, further, shape=("N", 3, 6, 5)):
    arrays = {f"input_{i}": np.asarray(array) for i, array in enumerate(further) if array is not None}
    names = ["h", *(f"input_{i}" if array is not None else "" for i, array in enumerate(further))]
    arrays["faint"] = np.float32(0.5)
    nodes = [helper.make_node("Mul", ["x", "faint"], ["h"]), helper.make_node(op, names, ["z"], "it", **settings)]
    return written([*nodes, helper.make_node("Flatten", ["z"], ["y"])], arrays, shape, opset=opset)


@pytest.mark.parametrize("batch", ["open", "fixed"])
@pytest.mark.parametrize("name", CASES)
def test_operator(written, same, name, batch):
    op, opset, settings, further = CASES[name]
    same(one(written, op, opset, settings, further, ("N" if batch == "open" else 1, 3, 6, 5)))
