import io

import numpy as np
import pytest
from PIL import Image

from backdoorscan.errors import ImagesError
from backdoorscan.formats.images import load_picture

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def refused(path, shape, *fragments):
    with pytest.raises(ImagesError) as caught:
        load_picture(path, shape)
    message = str(caught.value)
    assert message.count("\n") <= 2, message
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff"])
def test_colour(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(RGB).save(path)
    picture = load_picture(path, (3, 5, 7))
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, RGB.transpose(2, 0, 1))
    assert picture.flags.c_contiguous


def test_lossy_formats(tmp_path):
    flat = np.full((5, 7, 3), 200, np.uint8)
    for suffix in ("jpg", "webp"):
        Image.fromarray(flat).save(tmp_path / f"picture.{suffix}")
        assert np.abs(load_picture(tmp_path / f"picture.{suffix}", (3, 5, 7)).astype(int) - 200).max() < 5


def test_content_tells_the_format(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "picture.txt", format="PNG")
    assert np.array_equal(load_picture(tmp_path / "picture.txt", (1, 5, 7))[0], GREY)


def test_grey_for_a_colour_model_and_back(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(GREY).save(path)
    assert np.array_equal(load_picture(path, (3, 5, 7)), np.stack([GREY] * 3))
    Image.fromarray(np.stack([GREY] * 3, axis=2)).save(path)
    assert np.array_equal(load_picture(path, (1, 5, 7))[0], GREY)


def test_modes(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(GREY > 127).save(path)
    assert np.array_equal(load_picture(path, (1, 5, 7))[0], (GREY > 127) * 255)
    Image.fromarray(RGB // 128 * 255).quantize(8).save(path)
    assert np.array_equal(load_picture(path, (3, 5, 7)), (RGB // 128 * 255).transpose(2, 0, 1))
    opaque = np.dstack([RGB, np.full((5, 7), 255, np.uint8)])
    Image.fromarray(opaque).save(path)
    assert np.array_equal(load_picture(path, (3, 5, 7)), RGB.transpose(2, 0, 1))
    Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (7, 5), 255)]).save(path)
    assert np.array_equal(load_picture(path, (1, 5, 7))[0], GREY)


def test_transparency(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.dstack([RGB, np.full((5, 7), 254, np.uint8)])).save(path)
    refused(path, (3, 5, 7), "partly transparent")
    Image.fromarray(GREY).save(path, transparency=int(GREY[0, 0]))
    refused(path, (1, 5, 7), "partly transparent")


def test_other_modes(tmp_path):
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "deep.png")
    refused(tmp_path / "deep.png", (1, 5, 7), "mode I;16", "8 bits")
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "print.jpg")
    refused(tmp_path / "print.jpg", (3, 5, 7), "mode CMYK")


def test_never_resized(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "picture.png")
    refused(tmp_path / "picture.png", (3, 7, 5), "is 7×5 pixels, but the model takes 5×7")


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channel_counts(tmp_path, channels):
    refused(tmp_path / "picture.png", (channels, 5, 7), f"a model of {channels} channels")


def test_bombs(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "picture.png")
    for limit in (20, 10):  # Pillow warns above the limit, and refuses above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(tmp_path / "picture.png", (3, 5, 7), "is refused", "too many pixels")


def test_animations(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    refused(tmp_path / "pages.tiff", (3, 5, 7), "animated or has several pages")


@pytest.mark.parametrize("content", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n", b"GIF89a"])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "picture.png").write_bytes(content)
    refused(tmp_path / "picture.png", (3, 5, 7), "is not a picture", "PNG, JPEG")


def test_missing_empty_and_folder(tmp_path):
    refused(tmp_path / "picture.png", (3, 5, 7), "does not exist")
    (tmp_path / "picture.png").touch()
    refused(tmp_path / "picture.png", (3, 5, 7), "is empty")
    refused(tmp_path, (3, 5, 7), "not a regular file")
    refused(tmp_path / ("a" * 300), (3, 5, 7), "cannot be read")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated(tmp_path, kind):
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, format=kind)
    content = stream.getvalue()
    for length in (len(content) // 4, len(content) // 2):
        (tmp_path / "picture").write_bytes(content[:length])
        refused(tmp_path / "picture", (3, 5, 7))


def test_what_pillow_only_warns_of_is_an_error(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, format="TIFF")
    content = bytearray(stream.getvalue())
    at = content.index(b"\x11\x01")  # tag 273, where the pixels lie
    content[at + 4 : at + 8] = b"\xff\xff\0\0"
    (tmp_path / "picture").write_bytes(content)
    refused(tmp_path / "picture", (3, 5, 7), "cannot be read as a picture", "Skipping tag 273")


def test_damaged_exif_does_not_matter(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "picture.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0")
    assert load_picture(tmp_path / "picture.jpg", (3, 5, 7)).shape == (3, 5, 7)
