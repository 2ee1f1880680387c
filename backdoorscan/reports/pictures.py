"""Triggers and sample images as small PNG files inside the page."""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from backdoorscan.trigger import Trigger

Pixels = npt.NDArray[np.uint8]
"""Shape (H, W, 3), or (H, W, 4) with an alpha channel."""

_EDGE = 128
"""Pictures are enlarged by a whole factor until their longer side reaches this, and reduced to twice of it."""

_MOST_PIXELS = 2**22
"""A packed image larger than this is not opened."""

GREY = 128


def unpack(packed: object) -> npt.NDArray[np.float32] | None:
    """A packed image {"shape": [C, H, W], "uint8": base64 of zlib} as (C, H, W) in [0, 1]; ``None`` if it is none."""
    if not isinstance(packed, Mapping):
        return None
    shape, text = packed.get("shape"), packed.get("uint8")
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and isinstance(text, str)):
        return None
    if not all(isinstance(edge, int) and edge > 0 for edge in shape) or math.prod(shape) > _MOST_PIXELS:
        return None
    count = math.prod(shape)
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), count)
    except (zlib.error, binascii.Error, ValueError):
        return None
    if len(data) != count:
        return None
    return np.frombuffer(data, np.uint8).reshape(shape).astype(np.float32) / np.float32(255)


def samples(images: Mapping[str, Any] | None, shape: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
    """The sample images of a report that have the shape (C, H, W); at most 4."""
    packed = (images or {}).get("sample")
    found = [unpack(item) for item in (packed if isinstance(packed, list | tuple) else [packed])[:4]]
    return [image for image in found if image is not None and image.shape == shape]


def grey(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A mid-grey image (C, H, W)."""
    return np.full(shape, GREY / 255, np.float32)


def as_pixels(image: npt.NDArray[np.floating]) -> Pixels:
    """An image (C, H, W) in [0, 1] as (H, W, 3); channels beyond three are left out, two are shown as one."""
    image = image[:3] if image.shape[0] >= 3 else np.repeat(image[:1], 3, axis=0)
    pixels: Pixels = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return pixels


def trigger_pixels(trigger: Trigger) -> Pixels:
    """The pattern, as opaque as the mask: (H, W, 4)."""
    colours = as_pixels(trigger.pattern.detach().cpu().numpy())
    return np.concatenate([colours, mask_pixels(trigger)[:, :, :1]], axis=2)


def mask_pixels(trigger: Trigger) -> Pixels:
    """The mask, white where a pixel is replaced: (H, W, 3)."""
    return as_pixels(trigger.mask.detach().cpu().numpy())


def stamped_pixels(trigger: Trigger, image: npt.NDArray[np.float32]) -> Pixels:
    """The trigger on an image (C, H, W) in [0, 1]: (H, W, 3)."""
    mask, pattern = trigger.mask.detach().cpu().numpy(), trigger.pattern.detach().cpu().numpy()
    return as_pixels(image + mask * (pattern - image))


def data_uri(pixels: Pixels) -> str:
    """The picture as a PNG in a ``data:`` address, enlarged without smoothing."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    longer = max(picture.size)
    if longer > 2 * _EDGE:
        ratio = 2 * _EDGE / longer
        edges = [max(1, round(edge * ratio)) for edge in picture.size]
        picture = picture.resize((edges[0], edges[1]), Image.Resampling.BOX)
    elif longer < _EDGE:
        factor = math.ceil(_EDGE / longer)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
