"""Every kind of image file ends in the same 8-bit RGB, and what is none ends in a sentence."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.augment import warp
from unclip.data.images import ImageError, decode_image, load_image, make_grid, to_pil, to_pixels, to_tensor


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_alpha_is_laid_on_white() -> None:
    assert _pixel(_bytes(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert _pixel(_bytes(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))) == pytest.approx(
        (255, 127, 127), abs=1
    )
    assert _pixel(_bytes(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    assert _pixel(_bytes(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "WEBP", lossless=True)) == (255, 255, 255)


def test_palettes_with_and_without_a_transparent_colour() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert _pixel(_bytes(palette)) == (10, 200, 30)
    assert _pixel(_bytes(palette, transparency=1)) == (255, 255, 255)
    assert _pixel(_bytes(palette, "GIF")) == (10, 200, 30)


def test_greyscale_and_bilevel() -> None:
    assert _pixel(_bytes(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert _pixel(_bytes(Image.new("1", (4, 4), 1))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    image = decode_image(_bytes(Image.fromarray(values), kind))
    assert np.array_equal(np.asarray(image)[0, :, 0], [0, 1, 128, 255])


def test_floating_point_is_scaled() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    image = decode_image(_bytes(Image.fromarray(values), "TIFF"))
    assert np.array_equal(np.asarray(image)[0, :, 0], [0, 128, 255, 0])


def test_cmyk_jpeg() -> None:
    data = _bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert _pixel(data) == pytest.approx((255, 0, 0), abs=6)
    # a reduced decoding must not change the colours
    assert decode_image(data, min_edge=4).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=6)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to look right
    turned = decode_image(_bytes(image, "PNG", exif=exif))
    assert turned.size == (4, 8)
    assert turned.getpixel((3, 0)) == (255, 0, 0)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert _pixel(_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)
    animated = _bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert _pixel(animated) == (255, 0, 0)


def _huge_png() -> bytes:
    """A few hundred bytes that announce 60000 x 60000 pixels."""
    data = bytearray(_bytes(Image.new("L", (1, 1))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the image is empty"),
        (b"<svg></svg>", "not an image in a format that is read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image in a format"),
        (_bytes(Image.effect_noise((64, 64), 50))[:900], "cannot be decoded as an image: .*truncated"),
        (
            _bytes(Image.effect_noise((64, 64), 50), "JPEG")[:900],
            "cannot be decoded as an image: .*truncated",
        ),
        (_huge_png(), "refused as a possible decompression bomb"),
    ],
)
def test_damage_ends_in_one_sentence(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_bomb_limit_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = _bytes(Image.new("RGB", (11, 10)))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ImageError, match="11 x 10 is over the limit"),
    ):
        decode_image(data)
    assert decode_image(_bytes(Image.new("RGB", (10, 10)))).size == (10, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(data).size == (11, 10)


def test_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no image file at .*absent\.png"):
        load_image(tmp_path / "absent.png")
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(ImageError, match=r"bad\.png is not an image"):
        load_image(tmp_path / "bad.png")
    Image.new("RGB", (3, 5), "red").save(tmp_path / "good.png")
    assert load_image(str(tmp_path / "good.png")).size == (3, 5)


def test_resize_keeps_the_centre_and_antialiases() -> None:
    wide = Image.new("RGB", (200, 100), "blue")
    wide.paste("red", (50, 0, 150, 100))
    assert np.array_equal(to_pixels(wide, 32)[:, 16, [4, 16, 27]], [[255] * 3, [0] * 3, [0] * 3])
    checks = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    assert to_pixels(checks, 32).float().std() < 2  # aliasing would leave black and white
    assert to_pixels(Image.new("RGB", (1, 20000)), 64).shape == (3, 64, 64)
    assert to_pixels(wide, 256).shape == (3, 256, 256)


def test_reduced_decoding_looks_the_same() -> None:
    x, y = np.meshgrid(np.arange(512), np.arange(640))
    array = np.stack([x / 2, y * 0.4, 127 + 100 * np.sin(x / 40)], -1).astype(np.uint8)
    data = _bytes(Image.fromarray(array), "JPEG", quality=95)
    reduced = decode_image(data, min_edge=128)
    assert reduced.size == (128, 160)
    difference = to_pixels(reduced, 64).float() - to_pixels(decode_image(data), 64).float()
    assert difference.abs().mean() < 1


def test_tensor_and_picture_are_inverse() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels), 9)
    assert tensor.shape == (3, 9, 9) and tensor.dtype == torch.float32
    assert tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_pil(tensor)), pixels)
    assert to_pil(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"\(3, H, W\), got \(1, 2, 2\)"):
        to_pil(torch.zeros(1, 2, 2))


def test_grid() -> None:
    grid = make_grid(
        [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")], columns=2, gap=1
    )
    assert grid.size == (17, 17)
    assert grid.getpixel((16, 0)) == (0, 128, 0)
    assert grid.getpixel((0, 16)) == (0, 0, 255)
    assert grid.getpixel((16, 16)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least one image"):
        make_grid([], 2)


def test_warping_is_exact_where_it_can_be() -> None:
    """Nothing to do gives the picture back; a shift moves whole pixels and fills with the corner's colour."""
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    still = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(2, 4)
    assert torch.allclose(warp(images, still), images, atol=1e-5)
    shifted = warp(images, torch.tensor([[0.25, 0.0, 1.0, 0.0], [0.0, 0.25, 1.0, 0.0]]))
    assert torch.allclose(shifted[0, :, :, 4:], images[0, :, :, :-4], atol=1e-5)
    assert torch.allclose(shifted[1, :, 4:], images[1, :, :-4], atol=1e-5)
    assert torch.allclose(shifted[0, :, :, :3], images[0, :, :1, :1].expand(3, 16, 3), atol=1e-5)
    turned = warp(images, torch.tensor([[0.0, 0.0, 1.0, torch.pi / 2]]).expand(2, 4))
    assert torch.allclose(turned, images.rot90(-1, (2, 3)), atol=1e-4)  # a positive angle turns clockwise
