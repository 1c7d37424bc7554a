import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from danet.data import images
from danet.data.images import open_image, open_label
from danet.errors import UserError

RED = (200, 30, 40)


def saved(tmp_path: Path, image: Image.Image, name: str = "picture.png", **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("RGB", (4, 3), RED), "a.png", RED),
        (Image.new("L", (4, 3), 77), "a.png", (77, 77, 77)),
        (Image.new("1", (4, 3), 1), "a.png", (255, 255, 255)),
        (Image.new("LA", (4, 3), (77, 0)), "a.png", (77, 77, 77)),
        (Image.new("RGBA", (4, 3), (*RED, 0)), "a.png", RED),
        (Image.new("RGB", (4, 3), RED).quantize(4), "a.png", RED),
        (Image.new("RGB", (4, 3), RED).quantize(4), "a.gif", RED),
        (Image.fromarray(np.full((3, 4), 0x4D21, np.uint16)), "a.png", (0x4D, 0x4D, 0x4D)),
        (Image.new("CMYK", (4, 3), (0, 0, 0, 0)), "a.tif", (255, 255, 255)),
        (Image.new("RGB", (1, 1), RED), "a.bmp", RED),
    ],
)
def test_every_mode_becomes_rgb(
    image: Image.Image, name: str, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    opened = open_image(saved(tmp_path, image, name))
    assert opened.mode == "RGB"
    assert opened.size == image.size
    assert opened.getpixel((0, 0)) == expected


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    """Orientation 6: the stored picture's left edge is the upright one's top."""
    stored = Image.new("RGB", (64, 32), "white")
    stored.paste("black", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = open_image(saved(tmp_path, stored, "a.jpg", exif=exif))
    assert upright.size == (32, 64)
    assert max(upright.getpixel((16, 10))) < 20
    assert min(upright.getpixel((16, 54))) > 235


def png_header(
    width: int,
    height: int,
    depth_and_kind: tuple[int, int] = (8, 2),
    rows: bytes = b"\0" * 100,
) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, *depth_and_kind, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    data = chunk(b"IDAT", zlib.compress(rows))
    return signature + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"just text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (png_header(40_000, 40_000), "million pixels"),
        (png_header(13_000, 13_000), "million pixels"),
        (png_header(100, 100), "damaged"),
        (png_header(0, 5), "damaged|not a picture"),
    ],
)
def test_what_is_no_picture_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_image(path)
    assert "broken.png" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="is a folder; name a picture"):
        open_image(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damage_never_escapes_as_another_error(data: st.DataObject, kind: str) -> None:
    """Any byte changed anywhere, any tail cut off: a picture or a UserError."""
    content = bytearray(ENCODED[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    with contextlib.suppress(UserError):
        assert open_image(bytes(content)).mode == "RGB"


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


ENCODED = {kind: _encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}


def palette_label() -> Image.Image:
    image = Image.fromarray(np.array([[0, 3], [7, 255]], np.uint8))
    image.putpalette([9] * 768)
    return image


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.fromarray(np.array([[0, 3], [7, 255]], np.uint8)),
        lambda: Image.fromarray(np.array([[0, 3], [7, 255]], np.uint16)),
        palette_label,
        lambda: Image.fromarray(np.repeat(np.array([[0, 3], [7, 255]], np.uint8)[..., None], 3, 2)),
    ],
)
def test_labels_of_every_kind_give_the_same_ids(
    make: Callable[[], Image.Image], tmp_path: Path
) -> None:
    ids = open_label(saved(tmp_path, make()))
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, [[0, 3], [7, 255]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (2, 2), RED), "cannot be a label"),
        (Image.fromarray(np.full((2, 2), 300, np.uint16)), "0..255"),
        (Image.new("RGBA", (2, 2)), "cannot be a label"),
    ],
)
def test_labels_that_are_none(image: Image.Image, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_label(saved(tmp_path, image))


@pytest.mark.parametrize("kind", ["grey", "palette"])
@pytest.mark.parametrize(
    ("depth", "ids"),
    [(1, [0, 0, 0, 1, 1, 0, 1, 1]), (2, [0, 1, 2, 3]), (4, [1, 11]), (8, [27])],
)
def test_labels_of_every_depth_give_the_stored_ids(
    depth: int, ids: list[int], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    if kind == "grey":  # which Pillow writes in 8 bits only
        path.write_bytes(png_header(len(ids), 1, (depth, 0), b"\0\x1b"))  # 00011011, no filter
    else:
        image = Image.fromarray(np.array([ids], np.uint8))
        image.putpalette([9] * 768)
        image.save(path, bits=depth)
    np.testing.assert_array_equal(open_label(path), [ids])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *(("JPEG", "JPEG are lossy"), ("MPO", "MPO are lossy"), ("WEBP", "WEBP may be lossy")),
        ("TIFF", "JPEG are lossy"),
    ],
)
def test_lossy_labels_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    """Told by their content: a wrong suffix does not hide it."""
    image = Image.new("L" if kind != "WEBP" else "RGB", (8, 8))
    options = {
        "MPO": {"save_all": True, "append_images": [image]},
        "TIFF": {"compression": "jpeg"},
    }.get(kind, {})
    path = saved(tmp_path, image, format=kind, **options)
    with pytest.raises(UserError, match=rf"picture\.png: labels in {message}; save them as PNG"):
        open_label(path)


def test_pixel_limit_is_checked_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    path = saved(tmp_path, Image.new("RGB", (4, 3)))
    with pytest.raises(UserError, match="pixels"):
        open_image(path)


@pytest.mark.parametrize("magic", ["P2", "P5"])
def test_labels_that_pillow_would_scale_are_refused(magic: str, tmp_path: Path) -> None:
    path = tmp_path / "label.pgm"
    pixels = b"\x00\x01\x02\x0a" if magic == "P5" else b"0 1 2 10"
    path.write_bytes(f"{magic}\n2 2\n10\n".encode() + pixels)
    with pytest.raises(UserError, match=r"label.pgm: its levels .* save labels as PNG"):
        open_label(path)
    path.write_bytes(f"{magic}\n2 2\n255\n".encode() + pixels)
    assert open_label(path).tolist() == [[0, 1], [2, 10]]


def test_a_limit_of_pixels_raises_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    path = saved(tmp_path, Image.new("RGB", (4, 4)))
    with pytest.raises(images.PictureTooLarge):
        open_image(path, max_pixels=1000)


@pytest.mark.parametrize("level", [200, 200 << 8])
def test_levels_of_32_bits_are_of_8_or_16(level: int) -> None:
    image = Image.fromarray(np.full((2, 2), level, np.int32))
    assert images.to_rgb(image).getpixel((0, 0)) == (200, 200, 200)
