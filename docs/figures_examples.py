"""The figures of examples/editing and examples/personalise, drawn with the bundled model and fixed seeds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from figures_evaluation import NotNamed
from PIL import Image
from torch import Tensor

from unclip.data.images import to_pil
from unclip.data.lettering import labelled_sheet

if TYPE_CHECKING:
    from unclip import UnCLIP

EXAMPLES = Path(__file__).parents[1] / "examples"
CELL, COLOURS = 96, 200
ETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NUS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@cache
def model() -> UnCLIP:
    from unclip import UnCLIP

    return UnCLIP.from_pretrained(device="cpu", size=64)


@cache
def drawn(prompt: str) -> Image.Image:
    return model().sample(prompt, seed=0)[0]


def example(folder: str, name: str) -> Any:
    """A script of an example as a module."""
    if str(EXAMPLES / folder) not in sys.path:
        sys.path.append(str(EXAMPLES / folder))
    return import_module(name)


def cells(images: list[Image.Image] | Tensor) -> list[Image.Image]:
    pictures = [to_pil(image) for image in images] if isinstance(images, Tensor) else images
    return [image.resize((CELL, CELL), Image.Resampling.LANCZOS) for image in pictures]


def packed(sheet: Image.Image) -> Image.Image:
    """With a palette, which halves the file."""
    return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def prompt_to_prompt() -> Image.Image:
    """Captions changed with the embedding kept, then with the target's own embedding and the source's attention."""
    edit, rows = example("editing", "prompt_to_prompt").prompt_to_prompt, []
    pairs = (("red apple", "green apple"), ("fox", "wolf"), ("pizza", "cookie"))
    for source, target in pairs:
        kept = edit(model(), source, target, embeddings="shared", text=0.0, everything=0.0, steps=10)
        own = edit(model(), source, target, text=0.0, everything=0.0, steps=10)
        words = edit(model(), source, target, text=0.8, everything=0.0, steps=10)
        all_of_it = edit(model(), source, target, text=0.8, everything=0.4, steps=10)
        rows.append(cells(torch.stack([own[0], kept[1], own[1], words[1], all_of_it[1]])))
    heads = ["source", "new caption,\nsame embedding", "new embedding", "words' attention", "all attention"]
    return packed(labelled_sheet(rows, [f"{source}\nto {target}" for source, target in pairs], heads))


def imagic() -> Image.Image:
    learn, rows = example("editing", "imagic").imagic, []
    pairs = (("fox", "wolf"), ("red apple", "green apple"))
    for source, prompt in pairs:
        picture = drawn(source)
        found = learn(model(), picture, prompt, embedding_steps=20, network_steps=30)
        rows.append([*cells([picture]), *cells(torch.cat([found.draw(eta) for eta in ETAS]))])
    heads = ["picture", *(f"eta {eta:g}" for eta in ETAS)]
    return packed(labelled_sheet(rows, [f"{source}\nto {prompt}" for source, prompt in pairs], heads))


def magic_mix() -> Image.Image:
    mix, rows = example("editing", "magic_mix").magic_mix, []
    pairs = (("pizza", "basketball"), ("owl", "fox"), ("red apple", "strawberry"))
    for source, prompt in pairs:
        picture = drawn(source)
        rows.append([*cells([picture]), *cells(torch.cat([mix(model(), picture, prompt, nu=nu) for nu in NUS]))])
    heads = ["picture", *(f"nu {nu:g}" for nu in NUS)]
    return packed(labelled_sheet(rows, [f"{source}\nto {prompt}" for source, prompt in pairs], heads))


def elsewhere() -> Image.Image:
    """Drawings in other styles and a variation of each; SOURCE in the environment names the emoji's vectors."""
    if not (folder := os.environ.get("SOURCE")):
        raise NotNamed("needs SOURCE in the environment; see examples/emoji/README.md")
    script, prepare, rows = example("emoji", "elsewhere"), example("emoji", "prepare"), []
    files = {row["name"]: Path(folder) / row["file_name"] for row in prepare.read_rows(Path(folder))}
    for name in ("rocket", "strawberry", "guitar", "penguin", "sailboat"):
        seen = [script.restyled(files[name], name, style, script.SIZE) for style in script.STYLES]
        varied = model().decode(model().embed_image(seen), seed=0)
        rows.append([cell for pair in zip(cells(seen), cells(varied), strict=True) for cell in pair])
    heads = [head for style in script.STYLES for head in (style, "variation")]
    return packed(labelled_sheet(rows, None, heads))


def personalise() -> Image.Image:
    """From the runs of examples/personalise/train.sh, which are made first unless RUNS names some."""
    recover = example("personalise", "recover")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(os.environ.get("RUNS", folder))
        if not (runs / "decoder_alone" / "adapter").is_dir():
            environment = {**os.environ, "RUNS": str(runs), "DATA": str(runs / "data")}
            subprocess.run([str(EXAMPLES / "personalise" / "train.sh")], check=True, env=environment, stdout=sys.stderr)
        return packed(recover.sheet(recover.recover(runs)))


FIGURES: dict[str, Callable[[], Image.Image | None]] = {
    "prompt_to_prompt": prompt_to_prompt,
    "imagic": imagic,
    "magic_mix": magic_mix,
    "elsewhere": elsewhere,
    "personalise": personalise,
}
