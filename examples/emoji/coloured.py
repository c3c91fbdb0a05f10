"""Every emoji at full size on coloured backgrounds, captioned so: "a rocket on a blue background".

    python examples/emoji/coloured.py --source my/noto-emoji --out data/emoji_coloured --size 128

`--out` gets webdataset tars, which `data.source` reads. A background that an emoji does not stand out from is left
out, and so is an emoji that leaves none of it to be seen.
What is held out is a function of hashes, the same as in scenes.py: some backgrounds of every emoji belong to the split
`held_out` and are in no picture of `trained`.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_scenes import nearest_background
from nouns import indefinite
from PIL import Image
from prepare import PrepareError, claim, collect, positive
from scene_drawing import BACKGROUNDS, piece, visible, write_shard
from scenes import SHARD, is_held_out
from torch import Tensor
from torch.nn import functional as F

COLOURS = [name for name in BACKGROUNDS if name != "white"]
NEAREST = 32  # edge at which pictures are compared
CLEAR = 0.05  # share of the square that an emoji must leave to the background


@dataclass(frozen=True)
class Coloured:
    """An emoji on a background; the captions of one are each of its own, with the background."""

    name: str
    svg: str
    background: str
    captions: tuple[str, ...]


def coloured(source: Path, names: Path | None, split: str) -> list[Coloured]:
    """All of a split, in an order that is mixed and always the same."""
    found: list[Coloured] = []
    for emoji in collect(source, names, natural=True):
        try:
            drawn = piece(str(emoji.svg), 64)
        except ValueError:  # broken drawings are reported by prepare.py
            continue
        if (np.asarray(drawn)[..., 3] < 8).mean() < CLEAR:
            continue
        said = [text for text in emoji.meta["captions"] if "background" not in text]
        for background in COLOURS:
            held = is_held_out(f"{emoji.meta['name']} on {background}")
            if visible(drawn, BACKGROUNDS[background]) and held == (split == "held_out"):
                where = f"on {indefinite(background)} background"
                captions = tuple(f"{text} {where}" for text in said)
                found.append(Coloured(emoji.meta["name"], str(emoji.svg), background, captions))
    random.Random(0).shuffle(found)
    return found


def render(one: Coloured, size: int) -> Image.Image:
    canvas = Image.new("RGB", (size, size), BACKGROUNDS[one.background])
    drawn = piece(one.svg, size)
    canvas.paste(drawn, (0, 0), drawn)
    return canvas


# ---------------------------------------------------------------- the data set


def _samples(first: int, rows: Sequence[Coloured], size: int) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for index, one in enumerate(rows, first):
        out = io.BytesIO()
        render(one, size).save(out, "PNG", compress_level=3)
        truth = {key: value for key, value in asdict(one).items() if key != "svg"}
        yield f"{index:09d}", out.getvalue(), {"caption": one.captions[0], **truth}


def _shard(job: tuple[int, list[Coloured]], *, out: Path, size: int) -> int:
    first, rows = job
    path = out / f"{first // SHARD:06d}.tar"
    if not path.exists():
        write_shard(path, _samples(first, rows, size))
    return len(rows)


def write(source: Path, names: Path | None, out: Path, size: int, split: str, workers: int) -> int:
    """Tars of 1,000 pictures each; a stopped run goes on with the first missing tar. Returns how many there are."""
    rows = coloured(source, names, split)
    if not rows:
        raise PrepareError(f"{source} has no emoji for the split {split!r}.")
    claim(out, {"coloured": len(rows), "size": size, "split": split, "names": str(names)})
    jobs = [(first, rows[first : first + SHARD]) for first in range(0, len(rows), SHARD)]
    with multiprocessing.Pool(workers) as pool:
        return sum(pool.imap_unordered(partial(_shard, out=out, size=size), jobs))


# ---------------------------------------------------------------- the figure


class Coloureds:
    """Judges pictures of emoji on coloured backgrounds."""

    def __init__(self, source: Path) -> None:
        every = {emoji.meta["name"]: str(emoji.svg) for emoji in collect(source, None)}
        self._row: dict[str, int] = {}
        drawn = []
        for name, svg in every.items():
            try:
                rgba = np.asarray(piece(svg, 2 * NEAREST), np.float32) / 255
            except ValueError:
                continue
            rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], 2)
            self._row[name] = len(drawn)
            drawn.append(rgba.reshape(NEAREST, 2, NEAREST, 2, 4).mean((1, 3)))
        self._drawn = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)  # colours times alpha, and alpha

    def judge(self, picture: Tensor, asked: Coloured) -> tuple[bool, bool]:
        """Whether the background of a picture (3, S, S) in [0, 1], where the emoji leaves it free, is the one asked
        for, and whether of all emoji on that background the one asked for is the nearest at 32×32."""
        small = F.interpolate(picture[None], (NEAREST, NEAREST), mode="area")[0]
        free = self._drawn[self._row[asked.name], 3] < 0.03
        found = nearest_background(small[:, free].median(dim=1).values)
        colour = torch.tensor(BACKGROUNDS[asked.background], dtype=torch.float32)[:, None, None] / 255
        every = self._drawn[:, :3] + (1 - self._drawn[:, 3:]) * colour
        errors = (every - small).square().mean((1, 2, 3))
        twins = (every - every[self._row[asked.name]]).square().mean((1, 2, 3)) < 4e-6  # some share one drawing
        return found == asked.background, bool(twins[errors.argmin()])


def judged(pictures: Tensor, asked: Sequence[Coloured], eyes: Coloureds) -> dict[str, Any]:
    """Shares of pictures (B, 3, S, S) in [-1, 1] with the background, with the emoji, and with both as asked."""
    verdicts = [eyes.judge((picture + 1) / 2, one) for picture, one in zip(pictures, asked, strict=True)]
    both = [all(verdict) for verdict in verdicts]
    return {
        "pictures": len(verdicts),
        "right": sum(both) / len(both),
        "background": sum(verdict[0] for verdict in verdicts) / len(verdicts),
        "emoji": sum(verdict[1] for verdict in verdicts) / len(verdicts),
        "wrong": [one.captions[0] for one, ok in zip(asked, both, strict=True) if not ok],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with metadata.jsonl and svg/")
    parser.add_argument("--names", type=Path, help="file with the names to use, one per line (# comments)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tars (new, or one to go on with)")
    parser.add_argument("--size", type=positive, default=128, help="side of the pictures in pixels")
    parser.add_argument("--split", choices=("trained", "held_out"), default="trained")
    parser.add_argument("--workers", type=positive, default=2, help="processes that draw")
    args = parser.parse_args(argv)
    try:
        count = write(args.source, args.names, args.out, args.size, args.split, args.workers)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} pictures", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
