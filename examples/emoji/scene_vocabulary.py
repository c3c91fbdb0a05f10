"""What scenes are made of: the emoji that can be counted, seen and told apart when they are small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from phrasings import noun
from prepare import PrepareError, plain, read_rows
from scene_drawing import BACKGROUNDS, piece, visible

GROUPS = {"Animals and nature", "Food and drink", "Activities and events", "Travel and places", "Objects",
          "Smileys and emotions"}  # fmt: skip
# Names that no count or place suits in a sentence, and faces that say more than a noun can.
UNFIT = re.compile(
    r"and\b|\bup\b|\bdown\b|o'clock|-thirty|holding|blowing|struck|dashing|pouring|fluttering|shaking|showing|speaker|"
    r"gesture|call me|light rail|metro|station|weather|back of|middle finger|viewing|wedding|performing|cricket|"
    r"dim |clothes|man's|woman's|index|palm|pinch|anger|collision|collisions|cooking|seat\b|construction|rolling"
)
LOOK_ALIKE = 0.035  # mean squared difference at 20 px below which two drawings are taken for one


@dataclass(frozen=True)
class Thing:
    """An emoji that scenes are made of."""

    name: str
    noun: str
    svg: str
    backgrounds: tuple[str, ...]  # those it stands out from


def vocabulary(source: Path, names: Sequence[str] | None = None) -> list[Thing]:
    """The emoji that can be counted, seen and told apart at 20 px, in the source's order."""
    things: list[Thing] = []
    seen = np.zeros((0, 20 * 20 * 3), np.float32)
    for row in read_rows(source):
        name = plain(row["name"])
        one = noun(name, row["group"])
        wanted = row["group"] in GROUPS or re.fullmatch(r"(\w+ )+heart", name)
        if one is None or not wanted or UNFIT.search(name) or len(one.split()) > 5 or ":" in name:
            continue
        if names is not None and row["name"] not in names:
            continue
        svg = source / row["file_name"]
        try:
            drawn = piece(str(svg), 20)
        except ValueError:  # broken drawings are reported by prepare.py
            continue
        fits = tuple(b for b, colour in BACKGROUNDS.items() if visible(drawn, colour))
        rgba = np.asarray(drawn, np.float32) / 255
        flat = (rgba[..., :3] * rgba[..., 3:] + 0.5 * (1 - rgba[..., 3:])).reshape(1, -1)
        if len(fits) < 2 or (len(seen) and ((seen - flat) ** 2).mean(1).min() * 20 < LOOK_ALIKE):
            continue
        seen = np.concatenate([seen, flat])
        things.append(Thing(row["name"], one, str(svg), fits))
    if not things:
        raise PrepareError(f"{source} has no emoji that a scene could be made of.")
    return things
