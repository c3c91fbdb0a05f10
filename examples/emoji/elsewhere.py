"""Pictures from elsewhere: known things in styles that no training picture has, for the figure on variations.

    python examples/emoji/elsewhere.py --source my/noto-emoji --names examples/emoji/familiar.txt --out data/elsewhere

Each drawing is made from the emoji's own vectors: in another palette, as line art, turned, blurred, and photo-like (lit
from one side, with a shadow, grain and a background that fades). The folder is one that `data.source` reads; each line
of its metadata.jsonl tells name and style. Nothing is random: grain follows from the name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from phrasings import pick
from PIL import Image, ImageFilter
from prepare import PrepareError, claim, plain, positive, read_names, read_rows, write_atomic
from scene_drawing import piece

SIZE = 256  # pixels; lines and blurs are made for about this size, and are coarser in smaller pictures
ROOM = 0.78  # share of the side that a thing takes, so that a turned one still fits


def palette(drawn: Image.Image, key: str) -> Image.Image:
    """Hues turned by 100° to 260°, somewhat paler, on a light background."""
    hue, saturation, value = drawn.convert("RGB").convert("HSV").split()
    turn = 71 + pick(f"hue {key}", 114)  # of 256
    hue = hue.point(lambda v: (v + turn) % 256)
    saturation = saturation.point(lambda v: int(v * 0.85))
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    turned.putalpha(drawn.getchannel("A"))
    return laid_on(turned, (246, 242, 230))


def line_art(drawn: Image.Image, key: str) -> Image.Image:
    """Dark contours of shapes and of changes in brightness, on white."""
    grey = np.asarray(laid_on(drawn, (255, 255, 255)).convert("L"), np.float32) / 255
    alpha = np.asarray(drawn.getchannel("A"), np.float32) / 255
    edges = np.maximum(_slope(grey) * 1.6, _slope(alpha))
    ink = Image.fromarray((255 * np.clip(edges * 3, 0, 1)).astype(np.uint8))
    ink = ink.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(0.6))
    return Image.composite(Image.new("RGB", drawn.size, (32, 32, 40)), Image.new("RGB", drawn.size, "white"), ink)


def _slope(values: np.ndarray) -> np.ndarray:
    down, across = np.gradient(values)
    return np.hypot(down, across)


def rotated(drawn: Image.Image, key: str) -> Image.Image:
    """Turned by 15° to 30° either way, on white."""
    angle = (15 + pick(f"angle {key}", 16)) * (1 if pick(f"side {key}", 2) else -1)
    return laid_on(drawn.rotate(angle, Image.Resampling.BICUBIC), (255, 255, 255))


def blurred(drawn: Image.Image, key: str) -> Image.Image:
    """Out of focus: a Gaussian blur of 2 % of the side."""
    return laid_on(drawn, (255, 255, 255)).filter(ImageFilter.GaussianBlur(drawn.width * 0.02))


def photo(drawn: Image.Image, key: str) -> Image.Image:
    """Lit from one side, with a soft shadow, grain, a slight blur and a background that fades."""
    side = drawn.width
    down, across = np.mgrid[0:side, 0:side] / side
    fade = np.stack([0.86 - 0.25 * down, 0.85 - 0.22 * down, 0.80 - 0.18 * down], -1)
    rgba = np.asarray(drawn, np.float64) / 255
    shadow = drawn.getchannel("A").filter(ImageFilter.GaussianBlur(side * 0.04))
    cast = np.roll(np.asarray(shadow, np.float64) / 255, (side // 25, side // 30), (0, 1))[..., None]
    lit = rgba[..., :3] * (0.72 + 0.4 * (1 - across))[..., None]
    seen = fade * (1 - 0.4 * cast) * (1 - rgba[..., 3:]) + lit * rgba[..., 3:]
    seen += np.random.default_rng(pick(f"grain {key}", 2**32)).normal(0, 0.03, seen.shape)
    return Image.fromarray((255 * np.clip(seen, 0, 1)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(side / 300))


STYLES: dict[str, Callable[[Image.Image, str], Image.Image]] = {
    "palette": palette,
    "line art": line_art,
    "rotated": rotated,
    "blurred": blurred,
    "photo": photo,
}


def laid_on(drawn: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", drawn.size, colour)
    canvas.paste(drawn, (0, 0), drawn)
    return canvas


def restyled(svg: Path, name: str, style: str, size: int) -> Image.Image:
    """One emoji in one of the STYLES. Raises ValueError for a broken drawing."""
    inner = round(size * ROOM)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    canvas.paste(piece(str(svg), inner), ((size - inner) // 2, (size - inner) // 2))
    return STYLES[style](canvas, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with metadata.jsonl and svg/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (new, or one to go on with)")
    parser.add_argument("--names", type=Path, help="file with the names to draw, one per line (# comments)")
    parser.add_argument("--size", type=positive, default=SIZE)
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.source)
        wanted = read_names(args.names, [row["name"] for row in rows]) if args.names else [row["name"] for row in rows]
        claim(args.out, {"elsewhere": wanted, "size": args.size})
        (args.out / "images").mkdir(exist_ok=True)
        lines = []
        for row in (row for row in rows if row["name"] in set(wanted)):
            for style in STYLES:
                file = f"images/{Path(row['file_name']).stem}_{style.replace(' ', '_')}.png"
                meta = {"file_name": file, "caption": plain(row["name"]).lower(), "name": row["name"], "style": style}
                try:
                    if not (args.out / file).exists():
                        picture = restyled(args.source / row["file_name"], row["name"], style, args.size)
                        picture.save(args.out / ".part.png")
                        (args.out / ".part.png").replace(args.out / file)
                except ValueError as error:
                    print(f"skipped {row['name']!r}: {error}", file=sys.stderr)
                    break
                lines.append(json.dumps(meta, ensure_ascii=False) + "\n")
        write_atomic(args.out / "metadata.jsonl", "".join(lines).encode())
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(lines)} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
