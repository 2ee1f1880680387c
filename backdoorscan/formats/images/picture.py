"""Single pictures, through Pillow."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images.reading import parsing, read_file

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
"""What is opened. Pillow knows more, among them EPS, for which it would start Ghostscript."""

_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"RGB", "RGBA", "P", "PA"})


def open_picture(path: Path) -> npt.NDArray[np.uint8]:
    """A picture as it is stored; an orientation noted in EXIF is not applied.

    An opaque alpha channel is dropped; a palette is looked up.

    Returns:
        Shape (C, H, W), C = 1 for grey and 3 for colour.

    Raises:
        ImagesError: Missing, damaged or no picture; too large; transparent, animated, or not 8 bits per channel.
    """
    return _planes(_decode(path))


def load_picture(path: str | Path, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """A picture for a model: grey or colour as the model wants it, but never resized.

    Args:
        path: A PNG, JPEG, BMP, PPM, TIFF or WebP file.
        shape: The model's input (C, H, W); C is 1 or 3.

    Returns:
        Shape (C, H, W), uint8.

    Raises:
        ImagesError: As ``open_picture``; or the picture's size is not H×W, or C is neither 1 nor 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ImagesError(
            f"{path}: a picture cannot be fed to a model of {channels} channels.",
            why="Pictures are grey (1 channel) or colour (3 channels).",
        )
    image = _decode(Path(path))
    if (image.height, image.width) != (height, width):
        raise ImagesError(
            f"{path} is {image.width}×{image.height} pixels, but the model takes {width}×{height} (width×height).",
            hint="Resize or crop it as the model's training data were.",
        )
    return _planes(image.convert("L" if channels == 1 else "RGB"))


def _planes(image: Image.Image) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decode(path: Path) -> Image.Image:
    """The picture in Pillow's mode ``L`` or ``RGB``."""
    content = read_file(path, str(path))
    with parsing(str(path), "a picture"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                warnings.simplefilter("error", UserWarning)  # what Pillow skipped over may be pixels,
                warnings.filterwarnings("ignore", message=".*EXIF")  # unless it is the camera's notes
                image = Image.open(io.BytesIO(content), formats=FORMATS)
                if getattr(image, "n_frames", 1) > 1:
                    raise ImagesError(f"{path} is animated or has several pages.", hint="Save one picture per file.")
                image.load()
        except UnidentifiedImageError as error:
            raise ImagesError(f"{path} is not a picture.", why=f"It is none of {', '.join(FORMATS)}.") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImagesError(f"{path} is refused.", why="It unpacks to too many pixels.") from error
        return _plain(image, path)


def _plain(image: Image.Image, path: Path) -> Image.Image:
    if image.mode not in _GREY | _COLOUR:
        raise ImagesError(
            f"{path}: pictures of mode {image.mode} are not supported.",
            hint="Save it as grey or RGB with 8 bits per channel.",
        )
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ImagesError(
            f"{path} is partly transparent.",
            why="What a model sees there depends on the background.",
            hint="Save it as RGB without an alpha channel.",
        )
    return image.convert("L" if image.mode in _GREY else "RGB")
