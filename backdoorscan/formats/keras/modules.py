"""Layers of Keras that ``torch.nn`` lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """How many rows 'same' adds before and after: the odd one goes behind.

    Args:
        size: Rows of the input.
        kernel: Rows that the kernel covers, dilation included.
        stride: Step between two windows.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], value: float) -> Tensor:
    top, bottom = same_padding(x.shape[2], kernel[0], stride[0])
    left, right = same_padding(x.shape[3], kernel[1], stride[1])
    return functional.pad(x, (left, right, top, bottom), value=value)


class SamePad2d(nn.Module):
    """Padding 'same' for inputs whose size the file leaves open.

    Args:
        kernel: What the kernel covers, dilation included.
        stride: The layer's strides.
        value: What to pad with.
    """

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], value: float = 0.0) -> None:
        super().__init__()
        self.kernel, self.stride, self.value = kernel, stride, value

    def forward(self, x: Tensor) -> Tensor:
        """Pad."""
        return _pad_same(x, self.kernel, self.stride, self.value)

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"kernel={self.kernel}, stride={self.stride}, value={self.value}"


class SameAvgPool2d(nn.Module):
    """Average pooling with padding 'same': what was padded doesn't count.

    Args:
        kernel: Size of a window.
        stride: Step between two windows.
    """

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        counted = _pad_same(torch.ones_like(x[:1, :1]), self.kernel, self.stride, 0.0)
        sums = functional.avg_pool2d(_pad_same(x, self.kernel, self.stride, 0.0), self.kernel, self.stride)
        return sums / functional.avg_pool2d(counted, self.kernel, self.stride)

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"kernel={self.kernel}, stride={self.stride}"


class GeneralReLU(nn.Module):
    """Keras's ReLU with all its settings.

    Args:
        max_value: Upper bound of the output; ``None`` for none.
        negative_slope: Slope below the threshold.
        threshold: Where the function starts to pass its input.
    """

    def __init__(self, max_value: float | None, negative_slope: float, threshold: float) -> None:
        super().__init__()
        self.max_value, self.negative_slope, self.threshold = max_value, negative_slope, threshold

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        passed = x if self.max_value is None else x.clamp(0.0, self.max_value)
        return torch.where(x > self.threshold, passed, self.negative_slope * (x - self.threshold))

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"max_value={self.max_value}, negative_slope={self.negative_slope}, threshold={self.threshold}"


class ElementwisePReLU(nn.Module):
    """PReLU with a slope of its own for every position.

    Args:
        shape: Shape of the slopes, without the batch; 1 where they are shared.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return torch.where(x >= 0, x, self.weight * x)

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"{tuple(self.weight.shape)}"


class LegacyHardSigmoid(nn.Module):
    """The hard sigmoid of Keras 2: clip(0.2 x + 0.5, 0, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return (0.2 * x + 0.5).clamp(0.0, 1.0)


class Exponential(nn.Module):
    """exp(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return x.exp()


class Squareplus(nn.Module):
    """(x + sqrt(x² + 4)) / 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate."""
        return (x + (x * x + 4.0).sqrt()) / 2.0


class Rescale(nn.Module):
    """x · scale + offset; the constants are buffers, so that no training touches them.

    Args:
        scale: Broadcasts against the input.
        offset: Broadcasts against the input.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale."""
        return x * self.scale + self.offset


class Normalize(nn.Module):
    """Keras's Normalization; mean and variance are buffers, so that no training touches them.

    Args:
        mean: Along ``dim``, or a single number.
        variance: Like ``mean``.
        dim: The axis, the batch counted.
        invert: Whether to undo the normalisation instead.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, dim: int, invert: bool) -> None:
        super().__init__()
        self.dim, self.invert = dim, invert
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)

    def _along(self, values: Tensor, rank: int) -> Tensor:
        shape: list[Any] = [1] * rank
        if values.ndim:
            shape[self.dim] = -1
        return values.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        mean = self._along(self.mean, x.ndim)
        deviation = self._along(self.variance, x.ndim).sqrt().clamp(min=1e-7)
        return x * deviation + mean if self.invert else (x - mean) / deviation

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"dim={self.dim}, invert={self.invert}"
