"""A tiny set of drawings for the tests of examples/emoji, and its scripts as modules."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji"
SCRIPTS = (
    "prepare", "nouns", "phrasings", "scene_drawing", "scenes", "check_scenes", "elsewhere", "coloured", "measure",
    "teach_words",
)  # fmt: skip
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{}</svg>'
DRAWINGS = [  # (name, group, keywords, what is drawn)
    ("red apple", "Food and drink", ["fruit", "ripe", "healthy"], '<circle cx="8" cy="8" r="7.5" fill="#d21"/>'),
    ("banana", "Food and drink", ["fruit", "tropical"], '<path d="M0 0 L16 0 L0 16 Z" fill="#fd0"/>'),
    ("sport utility vehicle", "Travel and places", ["drive", "jeep"],
     '<rect y="5" width="16" height="7" fill="#16f"/><rect x="2" y="10" width="4" height="4" fill="#222"/>'),
    ("ladder", "Objects", ["climb", "rung"],
     '<path d="M3 0h2v16H3zM11 0h2v16h-2zM4 4h8v2H4zM4 10h8v2H4z" fill="#740"/>'),
    ("owl", "Animals and nature", ["bird", "wise"],
     '<rect x="2" width="12" height="16" fill="#951"/><circle cx="5" cy="5" r="3" fill="#fff"/>'
     '<circle cx="11" cy="5" r="3" fill="#fff"/>'),
    ("cactus", "Animals and nature", ["desert", "plant"],
     '<path d="M6 0h4v16H6zM1 3h3v5h-3zM12 6h3v6h-3zM1 7h14v2H1z" fill="#093"/>'),
    ("enraged face", "Smileys and emotions", ["mad", "fruit"],
     '<circle cx="8" cy="8" r="8" fill="#f20"/><path d="M3 4h4v2H3zM9 4h4v2H9zM4 11h8v2H4z" fill="#000"/>'),
    ("grapes", "Food and drink", ["fruit", "bunch"],
     '<circle cx="4" cy="4" r="4" fill="#82c"/><circle cx="12" cy="4" r="4" fill="#82c"/>'
     '<circle cx="8" cy="12" r="4" fill="#82c"/>'),
]  # fmt: skip


@contextmanager
def scripts() -> Iterator[None]:
    """The scripts' folder on the path, as when one of them is run; afterwards their plain names are free again."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def make_source(folder: Path) -> Path:
    """The folder layout of the real set: metadata.jsonl and svg/."""
    (folder / "svg").mkdir(parents=True)
    lines = []
    for number, (name, group, words, drawn) in enumerate(DRAWINGS):
        (folder / "svg" / f"{number}.svg").write_text(SVG.format(drawn), encoding="utf-8")
        row = {"file_name": f"svg/{number}.svg", "emoji": str(number), "name": name, "keywords": words}
        lines.append(json.dumps({**row, "group": group, "skin_tone": None}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
