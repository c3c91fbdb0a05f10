"""Figures of docs/evaluation.md, made by the commands that the page shows.

In the environment: EMOJI, the folder that examples/emoji/prepare.py --captions natural makes of all emoji; SHAPES, the
model that examples/synthetic/train.sh trains; and EVALUATIONS, where results are kept (runs/evaluations by default), so
that a figure that was stopped goes on, and a second costs nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
COLOURS = 128
# Result -> the line of docs/evaluation.md that makes it. DATA and SHAPES stand for what the environment names.
LINES = {
    "eval": "eval --data DATA --prompts 1550 --num-images 2 --size 64 --reconstructions 16",
    "guidance": "sweep guidance --data DATA --prompts 200 --size 64 --scales 0.5 1 1.25 1.5 2 3 4",
    "steps": "sweep steps --data DATA --prompts 32 --size 64 --steps 2 5 10 --etas 0 1 hat --samplers ddim dpmpp_2m",
    "ddim": "sweep steps --model SHAPES --data synthetic --set synthetic.size=1024 --set synthetic.max_objects=1 "
    "--prompts 32 --size 64 --guidance 1 --samplers ddim",
    "prior": "sweep prior --data DATA --prompts 200 --size 64",
    "memorisation": "memorisation --data DATA --prompts 1550 --size 64",
}
NAMED = {"DATA": "EMOJI", "SHAPES": "SHAPES"}


class NotNamed(Exception):
    """The environment does not name what a figure is made from."""


def command(name: str) -> list[str]:
    """The line of a result with what the environment names. NotNamed: it does not name it."""
    words = []
    for word in LINES[name].split():
        if word in NAMED and not os.environ.get(NAMED[word]):
            raise NotNamed(f"needs {NAMED[word]} in the environment; see docs/figures_evaluation.py")
        words.append(os.environ[NAMED[word]] if word in NAMED else word)
    return words


def made(name: str, picture: str) -> Image.Image:
    """A picture of a report, which is made first where it is not there or not whole."""
    folder = Path(os.environ.get("EVALUATIONS", ROOT / "runs" / "evaluations")).absolute() / name
    cache = folder.parent / "cache"
    line = [sys.executable, "-m", "unclip", *command(name), "--out", str(folder), "--cache", str(cache)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(line, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)
    with Image.open(folder / f"{picture}.png") as found:
        return found.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)


FIGURES: dict[str, Callable[[], Image.Image | None]] = {
    "evaluation_curves": partial(made, "eval", "curves"),
    "evaluation_guidance": partial(made, "guidance", "sweep"),
    "evaluation_steps": partial(made, "steps", "sweep"),
    "evaluation_ddim": partial(made, "ddim", "sweep"),
    "evaluation_prior": partial(made, "prior", "sweep"),
    "evaluation_prior_pictures": partial(made, "prior", "pictures"),
    "evaluation_memorisation": partial(made, "memorisation", "distances"),
    "evaluation_closest": partial(made, "memorisation", "closest"),
}
