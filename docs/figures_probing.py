"""Figures of docs/probing.md, drawn by docs/figures.py from the bundled model with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image

from unclip.data.lettering import labelled_sheet

if TYPE_CHECKING:
    from unclip import UnCLIP

CELL = 112
COLOURS = 160


@lru_cache(maxsize=1)
def model() -> UnCLIP:
    from unclip import UnCLIP

    return UnCLIP.from_pretrained(device="cpu", size=256)


def small(image: Image.Image) -> Image.Image:
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def packed(sheet: Image.Image) -> Image.Image:
    """With a palette, which halves the file."""
    return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def drawn(prompt: str) -> Image.Image:
    """What stands for a picture of one's own."""
    return model().sample(prompt, seed=0)[0]


def pca() -> Image.Image:
    """Three pictures rebuilt from the first of their embeddings' principal components."""
    rows = []
    for prompt in ("red apple", "owl", "rocket"):
        picture = drawn(prompt)
        found = model().pca(picture, (5, 10, 20, 30, 40, 80, 128), seed=1)
        rows.append([small(picture), *map(small, found.images)])
    return packed(labelled_sheet(rows, None, ["picture", *map(str, found.dims)]))


def typographic() -> Image.Image:
    """An apple, and the apple with words on it."""
    attacks = model().typographic(drawn("red apple"), ["pizza", "red apple"], num_images=1, seed=1)
    rows = []
    for attack in attacks:
        shares = "\n".join(f"{name} {share:.0%}" for name, share in list(attack.probabilities.items())[:3])
        rows.append([small(attack.image), shares, *map(small, attack.variations)])
    return packed(labelled_sheet(rows, None, ["picture", "CLIP says", "variation"]))


def conditioning() -> Image.Image:
    """Three prompts, each by three conditions of the decoder."""
    rows: dict[str, list[Image.Image]] = {}
    prompts = ("pizza", "penguin", "sunflower", "camera")
    for prompt in prompts:
        for name, images in model().compare_conditioning(prompt, num_images=1, seed=0).items():
            rows.setdefault(name, []).append(small(images[0]))
    return packed(labelled_sheet(list(rows.values()), list(rows), prompts))


def guidance() -> Image.Image:
    """One prompt over the scales of decoder and prior."""
    scales, priors = (1, 1.5, 2, 3, 4), (1, 2, 4)
    found = model().guidance_sheet("fox", scales, prior_scales=priors, seed=0)
    rows = [[small(cell[0]) for cell in row] for row in found]
    names = [f"decoder {scale:g}" for scale in scales]
    return packed(labelled_sheet(rows, [f"prior {scale:g}" for scale in priors], names))


def mixtures() -> Image.Image:
    """Two pictures and what lies between and beyond them; a picture and prompts."""
    a, b = drawn("tangerine"), drawn("green apple")
    line = [model().mix([(a, 1 - w), (b, w)], seed=1)[0] for w in (0.0, 0.3, 0.5, 0.7, 1.0)]
    prompts = [
        model().mix([(drawn("dog face"), 0.6)], [(text, 0.4)], seed=1)[0]
        for text in ("wolf", "bear", "tiger face", "pig face", "fox")
    ]
    rows = [list(map(small, line)), list(map(small, prompts))]
    return packed(labelled_sheet(rows, ["tangerine\nto green apple", "0.6 dog face,\n0.4 another"]))


def negative() -> Image.Image:
    """The same seeds without and with a negative prompt, the prior's guidance at 2."""
    pairs = {"pizza": "red", "balloon": "red", "fox": "orange", "sunflower": "yellow"}
    plain = [small(model().sample(prompt, seed=0, prior_guidance=2)[0]) for prompt in pairs]
    away = [
        small(model().sample(prompt, seed=0, prior_guidance=2, negative_prompt=other)[0])
        for prompt, other in pairs.items()
    ]
    return packed(labelled_sheet([plain, away], ["plain", "negative"], [f"{p}, not {n}" for p, n in pairs.items()]))


def rerank() -> Image.Image:
    """The best and the worst of 24 by CLIP."""
    rows = []
    prompts = ("rocket", "turtle")
    for prompt in prompts:
        ranked = model().sample_best(prompt, num_images=24, keep=24, seed=0, guidance=1, prior_steps=4)
        rows.append([small(one.image) for one in (*ranked[:3], *ranked[-3:])])
    return packed(labelled_sheet(rows, list(prompts), ["1", "2", "3", "22", "23", "24"]))


FIGURES: dict[str, Callable[[], Image.Image | None]] = {
    "probing_pca": pca,
    "probing_typographic": typographic,
    "probing_conditioning": conditioning,
    "probing_guidance": guidance,
    "mixtures": mixtures,
    "negative_prompts": negative,
    "rerank": rerank,
}
