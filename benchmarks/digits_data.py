"""Real handwritten digits with captions: the 1,797 that scikit-learn carries, 8×8 (Alpaydin & Kaynak 1998, UCI)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 16  # of the pictures: every stored pixel is four
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = ("a handwritten {}", "the digit {} written by hand", "a scan of a handwritten {}", "the number {} in ink")
HELD_OUT_PHRASING = "somebody wrote a {} by hand"
"""Never in training."""


@dataclass(frozen=True)
class Digits:
    """Pictures (N, 3, SIZE, SIZE) in [-1, 1], dark ink on white, and what they show (N,)."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Digits:
        return Digits(self.pictures[:count], self.labels[:count])


def load_split(held_out: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """Training and held-out digits; of each class the same share is held out, chosen by `seed`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    indices = np.arange(len(found.target))
    train, test = train_test_split(indices, test_size=held_out, random_state=seed, stratify=found.target)
    ink = torch.from_numpy(found.images).float()[:, None] / 16
    # An interpolation may overshoot; ink cannot.
    larger = torch.nn.functional.interpolate(ink, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    levels = (255 * (1 - larger)).round() / 127.5 - 1  # what a PNG can hold
    pictures, labels = levels.expand(-1, 3, -1, -1), torch.from_numpy(found.target).long()
    return Digits(pictures[train], labels[train]), Digits(pictures[test], labels[test])


def captions_of(label: int) -> list[str]:
    return [phrasing.format(WORDS[label]) for phrasing in PHRASINGS]


def write_folder(digits: Digits, folder: Path) -> None:
    """The layout that `data.source` takes: PNGs and metadata.jsonl, with all training phrasings of each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, label) in enumerate(zip(digits.pictures, digits.labels.tolist(), strict=True)):
        name = f"{number:05d}.png"
        to_image(picture).save(folder / name)
        lines.append(json.dumps({"file_name": name, "captions": captions_of(label)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1]."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def sheet(digits: Digits, each: int = 12, scale: int = 4) -> Image.Image:
    """A row of the first `each` pictures of every digit."""
    edge = SIZE * scale + 4
    canvas = Image.new("RGB", (each * edge, len(WORDS) * edge), (120, 120, 120))
    for label in range(len(WORDS)):
        for column, picture in enumerate(digits.pictures[digits.labels == label][:each]):
            tile = to_image(picture).resize((SIZE * scale, SIZE * scale), Image.Resampling.NEAREST)
            canvas.paste(tile, (column * edge + 2, label * edge + 2))
    return canvas
