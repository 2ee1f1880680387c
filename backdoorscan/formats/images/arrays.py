"""Arrays as people store them -> pixels (N, C, H, W) and labels (N,) as the tool wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backdoorscan.errors import ImagesError
from backdoorscan.images import Array

CHANNEL_COUNTS = (1, 3, 4)

_ROUNDING = 1e-5
"""How far past 0 or 1 a float may stray and still count as 0 or 1."""

_SMALLEST_MAXIMUM = 16.0
"""Values that exceed 1 must exceed this too: else they are 0..16 digits or standardised, hardly a dark 0..255."""


def to_pixels(array: npt.NDArray[Any], source: str) -> Array:
    """Images in pixel space, contiguous.

    Where both axis 1 and axis 3 could hold the channels, axis 1 is taken: N×C×H×W, as CSAW-HackML and PyTorch
    have it.

    uint8 is 0..255 and stays as it is. Of any other type, values up to 1 are 0..1 and become float32; whole
    numbers up to 255 become uint8; fractions up to 255 are divided by 255 into float32. A highest value between
    1 and 16 is refused: taken for 0..255 it would make all images black.

    Args:
        array: Shape (N, C, H, W), (N, H, W, C) or (N, H, W), of booleans, integers or floats.
        source: Where it came from.

    Returns:
        Shape (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].

    Raises:
        ImagesError: No such shape, no images, or values that are neither 0..1 nor 0..255.
    """
    pixels = _in_range(_channels_first(array, source), source)
    return pixels if pixels.flags.c_contiguous else pixels.copy(order="C")


def _channels_first(array: npt.NDArray[Any], source: str) -> npt.NDArray[Any]:
    if array.size == 0:
        raise ImagesError(f"{source} holds no images.", why=f"The array has shape {array.shape}.")
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4:
        if array.shape[1] in CHANNEL_COUNTS:
            return array
        if array.shape[3] in CHANNEL_COUNTS:
            return np.moveaxis(array, 3, 1)
        why = f"Neither axis 1 nor axis 3 of shape {array.shape} has 1, 3 or 4 entries."
        raise ImagesError(f"{source}: it is not clear which axis holds the channels.", why=why)
    raise ImagesError(
        f"{source}: images of shape {array.shape} cannot be used.",
        why="Images are N×H×W, N×C×H×W or N×H×W×C.",
        hint="Reshape them and save them again.",
    )


def _in_range(pixels: npt.NDArray[Any], source: str) -> Array:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ImagesError(f"{source}: some pixels are not numbers (NaN or infinity).")
    low, high = float(pixels.min()), float(pixels.max())
    found = f"They go from {low:g} to {high:g}."
    hint = "Save the images as they were before the model's own scaling: that is found by itself."
    if low < -_ROUNDING:
        raise ImagesError(f"{source}: some pixels are negative.", why=f"{found} Pixels are 0..255 or 0..1.", hint=hint)
    if high <= 1 + _ROUNDING:
        return np.clip(pixels.astype(np.float32), 0, 1)
    if high > 255:
        raise ImagesError(f"{source}: some pixels exceed 255.", why=f"{found} Pixels are 0..255 or 0..1.", hint=hint)
    if high <= _SMALLEST_MAXIMUM:
        raise ImagesError(f"{source}: pixels are neither 0..1 nor 0..255.", why=found, hint=hint)
    pixels = pixels.clip(min=0)
    whole: npt.NDArray[np.uint8] = pixels.astype(np.uint8)
    if np.array_equal(whole, pixels):
        return whole
    fractions: npt.NDArray[np.float32] = pixels.astype(np.float32) / np.float32(255)
    return fractions


def to_labels(array: npt.NDArray[Any], source: str) -> npt.NDArray[np.int64]:
    """Class numbers.

    Args:
        array: Shape (N,), (N, 1), or (N, K) with one-hot rows, of booleans, integers or whole floats.
        source: Where it came from.

    Returns:
        Shape (N,), each at least 0.

    Raises:
        ImagesError: Another shape, no labels, fractions, negative numbers, NaN, or rows that are not one-hot.
    """
    if array.ndim not in (1, 2) or array.size == 0:
        raise ImagesError(
            f"{source}: labels of shape {array.shape} cannot be used.",
            why="Labels are one number per image, or one one-hot row per image.",
        )
    if array.ndim == 2 and array.shape[1] > 1:
        if not (((array == 0) | (array == 1)).all() and (np.count_nonzero(array, axis=1) == 1).all()):
            raise ImagesError(
                f"{source}: labels of shape {array.shape} are not one-hot rows.",
                why="Each row must hold a single 1 and zeros.",
                hint="Save class numbers, one per image.",
            )
        hot: npt.NDArray[np.int64] = array.argmax(axis=1).astype(np.int64)
        return hot
    flat = array.reshape(-1)
    # Compared before the cast: NaN, infinity and uint64 beyond int64 would come out of it as some other number.
    bad = ~((flat >= 0) & (flat < 2**31) & (flat == np.floor(flat)))
    if bad.any():
        at = int(bad.argmax())
        raise ImagesError(
            f"{source}: label {flat[at]} of image {at} is not a class number.", hint="Classes are 0, 1, 2 and so on."
        )
    return flat.astype(np.int64)
