"""Draw five pictures of something that the bundled model has never seen: a blue apple with a yellow band.

    python examples/personalise/subject.py --out data/subject [--caption "zorb apple"]

They stand in for photographs of your own: a folder of pictures with one caption each in metadata.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

SIZE = 256
POSES = ((0, 0, 1.0), (-14, 8, 0.9), (12, -10, 0.92), (8, 14, 0.82), (-10, -12, 0.86))
"""Where the middle lies, in pixels from the picture's own, and how large it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/subject"))
    parser.add_argument("--caption", default="zorb apple", help="the rare word and what kind of thing it is")
    arguments = parser.parse_args()
    write(arguments.out, pictures(), [arguments.caption] * len(POSES))


def pictures() -> list[Image.Image]:
    return [zorb(*pose) for pose in POSES]


def zorb(right: float = 0, down: float = 0, scale: float = 1.0) -> Image.Image:
    """The subject, (256, 256), on white."""
    large = 4 * SIZE  # drawn so and made smaller, for soft edges

    def at(x: float, y: float) -> tuple[float, float]:
        return large / 2 + 4 * (right + x * scale), large / 2 + 4 * (down + y * scale)

    def oval(pen: ImageDraw.ImageDraw, x: float, y: float, wide: float, high: float, fill: str) -> None:
        pen.ellipse((*at(x - wide, y - high), *at(x + wide, y + high)), fill=fill)

    image = Image.new("RGB", (large, large), "#ffffff")
    body, band = Image.new("L", image.size, 0), Image.new("L", image.size, 0)
    for x in (-30, 30):  # two overlapping halves, as of an apple
        oval(ImageDraw.Draw(body), x, 22, 66, 84, "white")
    ImageDraw.Draw(band).rectangle((*at(-110, 4), *at(110, 44)), fill="white")
    pen = ImageDraw.Draw(image)
    pen.line((*at(0, -50), *at(10, -92)), fill="#6b4226", width=round(40 * scale))
    oval(pen, 40, -82, 34, 14, "#3f9b3a")
    image.paste("#2b55c8", mask=body)
    image.paste("#f7cf2a", mask=ImageChops.multiply(body, band))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def write(folder: Path, images: list[Image.Image], captions: list[str]) -> None:
    """A folder as `data.source` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{number:04d}.png")
        rows.append({"file_name": f"{number:04d}.png", "caption": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
