"""Every layer class against Keras 3 itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.keras.modules import GeneralReLU


@pytest.mark.parametrize("size", [(7, 6), (8, 8), (5, 9)])
@pytest.mark.parametrize("kernel", [1, 2, 3, (4, 3), 5])
@pytest.mark.parametrize("strides", [1, 2, (3, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d(keras, check, size, kernel, strides, padding):
    check(keras.layers.Conv2D(4, kernel, strides=strides, padding=padding), shape=(*size, 3))


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation_rate": (2, 1)}, {"use_bias": False, "activation": "relu"}]
)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_options(keras, check, options, padding):
    check(keras.layers.Conv2D(4, 3, padding=padding, **options), shape=(8, 7, 4))


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_depthwise_and_separable(keras, check, multiplier, strides, padding):
    options = {"depth_multiplier": multiplier, "strides": strides, "padding": padding}
    loaded = check(
        keras.layers.DepthwiseConv2D(3, **options, name="dw"),
        keras.layers.SeparableConv2D(5, 2, **options, activation="tanh", name="sep"),
        shape=(9, 8, 3),
    )
    assert {"dw", "sep", "sep_depthwise", "sep_activation"} <= dict(loaded.network.named_modules()).keys()


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_transpose(keras, check, kernel, strides, padding):
    check(keras.layers.Conv2DTranspose(4, kernel, strides=strides, padding=padding), shape=(5, 4, 3))


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("output_padding", [0, 1])
def test_conv2d_transpose_output_padding(keras, check, kernel, padding, output_padding):
    layer = keras.layers.Conv2DTranspose(2, kernel, strides=2, padding=padding, output_padding=output_padding)
    check(layer, shape=(5, 4, 3))


def test_conv2d_transpose_dilation(keras, check):
    check(keras.layers.Conv2DTranspose(2, 3, dilation_rate=2, padding="same"), shape=(6, 5, 3))


@pytest.mark.parametrize("pool", [2, 3, (3, 2)])
@pytest.mark.parametrize("strides", [None, 1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_max_pooling(keras, check, pool, strides, padding):
    check(keras.layers.MaxPooling2D(pool, strides=strides, padding=padding), shape=(7, 8, 2))


def mean_of_windows(x, pool, strides, same):
    """Average pooling where only real pixels count, as TensorFlow and JAX do it (Keras on torch repeats the border)."""
    pads = []
    for size, k, s in zip(x.shape[1:3], pool, strides, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0) if same else 0
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(x, pool, axis=(1, 2))[:, :: strides[0], :: strides[1]]
    return np.nanmean(windows, axis=(-2, -1))


@pytest.mark.parametrize("pool", [(2, 2), (3, 3), (3, 2), (4, 5)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("open_size", [False, True])
def test_average_pooling(keras, run, load, tmp_path, pool, strides, padding, open_size):
    shape = (None, None, 2) if open_size else (7, 8, 2)
    pooling = keras.layers.AveragePooling2D(pool, strides=strides, padding=padding)
    # Only scores can come out of a model; over 40 images the maximum lies in every window.
    model = keras.Sequential([keras.Input(shape), pooling, keras.layers.GlobalMaxPooling2D()])
    model.save(tmp_path / "model.h5")
    x = np.random.default_rng(0).normal(size=(40, 7, 8, 2)).astype("float32")
    expected = mean_of_windows(x, pool, strides, padding == "same").max(axis=(1, 2))
    np.testing.assert_allclose(run(load(tmp_path / "model.h5"), x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["GlobalMaxPooling2D", "GlobalAveragePooling2D"])
@pytest.mark.parametrize("keepdims", [True, False])
def test_global_pooling(keras, check, kind, keepdims):
    check(getattr(keras.layers, kind)(keepdims=keepdims))


def test_dense_on_every_rank(keras, check):
    layers = keras.layers
    check(layers.Dense(5), shape=(4,))
    check(layers.Dense(5, activation="relu"), shape=(4, 3))
    check(layers.Dense(5, use_bias=False), layers.Conv2D(2, 2), layers.Flatten(), layers.Dense(4), shape=(4, 5, 3))


def test_grey_images_without_channels(keras, check):
    layers = keras.layers
    loaded = check(layers.Flatten(), layers.Dense(4), shape=(6, 5))
    assert loaded.input_shape == (6, 5)
    check(layers.Reshape((6, 5, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3), shape=(6, 5))


def test_reshape_and_permute(keras, check):
    layers = keras.layers
    check(layers.Reshape((3, 14, 3)), layers.Conv2D(2, 2))
    check(layers.Reshape((-1, 9)), layers.Dense(2))
    check(layers.Reshape((126,)), layers.Reshape((6, 7, 3)), layers.Conv2D(2, 2))
    check(layers.Permute((2, 1, 3)), layers.Conv2D(2, 2))
    check(layers.Permute((3, 1, 2)), layers.Conv2D(2, 2), layers.Permute((3, 2, 1)))
    # Channel shuffle as ShuffleNet writes it.
    check(layers.Reshape((7, 6, 2, 2)), layers.Permute((1, 2, 4, 3)), layers.Reshape((7, 6, 4)), shape=(7, 6, 4))


def test_padding_cropping_enlarging(keras, check):
    layers = keras.layers
    check(layers.ZeroPadding2D(((1, 0), (2, 3))), layers.Conv2D(2, 3))
    check(layers.ZeroPadding2D(2), layers.ZeroPadding2D((1, 0)))
    check(layers.Cropping2D(((1, 2), (0, 3))), layers.Conv2D(2, 2))
    check(layers.UpSampling2D(2), layers.UpSampling2D((2, 3), interpolation="bilinear"))


def test_batch_renormalization(keras, check):
    """Predicts as without; what it stores in addition is left out."""
    check(keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(renorm=True))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_batch_normalization(keras, check, scale, center):
    norm = keras.layers.BatchNormalization
    loaded = check(norm(scale=scale, center=center, name="bn"), norm(axis=1), norm(axis=2))
    assert isinstance(loaded.network.bn, nn.BatchNorm2d)
    assert ("bn.weight" in loaded.network.state_dict()) == scale
    check(norm(scale=scale, center=center), shape=(5,))
    check(norm(), norm(axis=1), shape=(5, 4))


@pytest.mark.parametrize("axis", [-1, 3, [2, 3], [1, 2, 3]])
def test_layer_normalization(keras, check, axis):
    check(keras.layers.LayerNormalization(axis=axis), keras.layers.LayerNormalization(scale=False))
    check(keras.layers.LayerNormalization(center=False), shape=(5,))


def test_group_normalization(keras, check):
    check(keras.layers.GroupNormalization(2), keras.layers.GroupNormalization(-1), shape=(5, 4, 6))


def test_layers_that_do_nothing(keras, check):
    layers = keras.layers
    check(
        layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomZoom(0.1), layers.RandomTranslation(0.1, 0.1),
        layers.RandomContrast(0.1), layers.RandomCrop(7, 6), layers.Dropout(0.3),
        layers.SpatialDropout2D(0.2), layers.GaussianNoise(0.1), layers.GaussianDropout(0.1),
        layers.AlphaDropout(0.1), layers.ActivityRegularization(0.1), layers.Identity(), layers.Conv2D(2, 2),
    )  # fmt: skip


def test_random_crop_that_crops_is_refused(keras, check):
    with pytest.raises(UnsupportedModelError, match="RandomCrop"):
        check(keras.layers.RandomCrop(5, 5))


ACTIVATIONS = [
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "sigmoid", "tanh", "softplus", "softsign", "swish",
    "silu", "gelu", "mish", "hard_sigmoid", "hard_swish", "hard_silu", "hard_tanh", "log_sigmoid", "tanh_shrink",
    "hard_shrink", "soft_shrink", "squareplus", "exponential", "softmax", "log_softmax", "linear",
]  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(keras, check, name):
    loaded = check(keras.layers.Conv2D(3, 1, activation=name, name="c"), keras.layers.Activation(name, name="act"))
    assert "act" in dict(loaded.network.named_modules())
    assert ("c_activation" in dict(loaded.network.named_modules())) == (name != "linear")
    check(keras.layers.Dense(5, activation=name), shape=(4,))


def test_activation_layers(keras, check):
    layers = keras.layers
    for layer in (
        layers.ReLU(), layers.ReLU(6), layers.ReLU(1.5), layers.ReLU(negative_slope=0.2),
        layers.ReLU(max_value=1.0, negative_slope=0.1, threshold=0.3), layers.ReLU(threshold=0.5),
        layers.LeakyReLU(0.1), layers.LeakyReLU(), layers.ELU(0.7), layers.Softmax(), layers.Softmax(axis=1),
        layers.PReLU(), layers.PReLU(shared_axes=[1, 2]), layers.PReLU(shared_axes=[3]),
        layers.Activation(layers.LeakyReLU(0.4)),
    ):  # fmt: skip
        check(layer)
    check(layers.PReLU(), layers.Dense(3, activation=layers.ReLU(max_value=0.5)), shape=(5,))


def test_relu_at_its_bounds(keras, tmp_path):
    x = np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0], dtype="float32")
    for top, slope, threshold in ((2.0, 0.1, 1.0), (None, 0.5, 1.0), (0.5, 0.0, 0.5)):
        layer = keras.layers.ReLU(top, slope, threshold)
        expected = np.asarray(layer(x))
        np.testing.assert_allclose(GeneralReLU(top, slope, threshold)(torch.from_numpy(x)), expected, atol=1e-6)


def test_rescaling_and_normalization_are_buffers(keras, check):
    layers = keras.layers
    loaded = check(
        layers.Rescaling(1 / 255, offset=-0.5),
        layers.Rescaling([0.5, 2.0, 3.0], offset=[0.1, 0.2, 0.3]),
        layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 0.5]),
        layers.Normalization(axis=None, mean=0.4, variance=2.0, invert=True),
        layers.Conv2D(2, 1, name="c"),
    )
    assert {name for name, _ in loaded.network.named_parameters()} == {"c.weight", "c.bias"}


def test_adapted_normalization(keras, check):
    layer = keras.layers.Normalization(axis=-1, name="norm")
    layer.adapt(np.random.default_rng(0).normal(2, 3, (20, 7, 6, 3)).astype("float32"))
    loaded = check(layer, keras.layers.Conv2D(2, 1))
    assert loaded.network.norm.mean.abs().min() > 0


def test_open_sizes(keras, check):
    layers = keras.layers
    for size in ((9, 8, 3), (11, 12, 3)):
        loaded = check(
            layers.Conv2D(4, 3, strides=2, padding="same"),
            layers.MaxPooling2D(2, padding="same"),
            layers.AveragePooling2D(2, strides=1, padding="same"),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2DTranspose(3, 3, strides=2, padding="same"),
            layers.GlobalAveragePooling2D(),
            shape=(None, None, 3),
            size=size,
        )
    assert loaded.input_shape == (3, None, None)


def test_head_without_dense_layer(keras, check):
    layers = keras.layers
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(5, 6)])
    loaded = check(*model.layers, layers.Softmax(), shape=(6, 6, 2))
    assert loaded.num_classes == 5
