"""Measure a bundle trained on the emoji set, and write the figures as JSON and Markdown.

    python examples/emoji/measure.py --data data/emoji_256 --source my/noto-emoji --model emoji --out figures

`--data` is made by `prepare.py --captions natural` from all emoji, `--source` holds the vectors. Figures:

- clip: whether a name's text embedding is nearest to its own picture's among all, and a picture's to its own name's;
- names, phrasings: a 64 px picture is drawn for a name, or for a phrasing that training never had; among all emoji at
  32×32 the named one must be the nearest by mean squared error;
- prior: cosines between the prior's embedding of a held-out phrasing and the picture's own, or another's;
- variations: the same test for pictures drawn from each emoji's own embedding; elsewhere: from restyled ones;
- coloured: whether name and background are right for "a rocket on a blue background", on trained and held-out pairs;
- scenes: what a picture shows, found by check_scenes.py, against its caption, on trained and held-out combinations;
- upsamplers: PSNR at 256 and 1024 px from true smaller pictures, against Lanczos.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from check_scenes import Judge, judge
from coloured import Coloureds, coloured
from coloured import judged as judged_coloured
from elsewhere import SIZE, STYLES, restyled
from PIL import Image
from prepare import PrepareError, plain, read_names, read_rows, render
from scene_vocabulary import vocabulary
from scenes import SIZES, Scene, scene
from torch import Tensor
from torch.nn import functional as F

SCENE_NAMES = Path(__file__).with_name("scene_things.txt")
SAME = 0.004  # root of the mean squared difference, of a range of 2, below which two drawings are one
FIGURES = ("clip", "names", "phrasings", "prior", "variations", "elsewhere", "coloured", "scenes", "upsamplers")
# What is asked of a good model; shown beside what was measured.
ASKED = {
    "clip.name_to_picture": 0.90, "clip.picture_to_name": 0.90,
    "names.identity": 0.90, "phrasings.identity": 0.75, "phrasings.keyword_identity": 0.75,
    "prior.cos_prediction_real": 0.85, "prior.cos_prediction_unrelated": -0.2, "variations.identity": 0.90,
    "scenes.trained.right": 0.80, "scenes.held_out.right": 0.60, "upsamplers.256.gain_db": 3.0,
    "upsamplers.1024.gain_db": 3.0,
}  # fmt: skip


@dataclass
class Emoji:
    """The data set: pictures (N, 3, 64, 64) in [-1, 1], the metadata lines, and which of them are measured."""

    rows: list[dict[str, Any]]
    pictures: Tensor
    asked: list[int]
    drawing: Tensor = field(init=False)  # (N,) the first emoji with the same drawing: some share one

    def __post_init__(self) -> None:
        small = thumbnails(self.pictures)
        same = distances(small, small) < SAME * small.shape[1] ** 0.5
        self.drawing = same.int().argmax(dim=1)

    def is_nearest(self, images: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
        """Whether of all drawings that of the target is the nearest to each of `images`, by mean squared error at
        32×32."""
        found = distances(thumbnails(images), thumbnails(self.pictures)).argmin(dim=1)
        return self.drawing[found] == self.drawing[torch.as_tensor(targets)]


@dataclass
class Settings:
    """How pictures are drawn; every sample option that is None is the model's own default."""

    count: int = 0  # how many a figure, drawn with a fixed seed; 0 for all
    seed: int = 0
    batch: int = 20
    options: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- figures


def clip(model: Any, emoji: Emoji, settings: Settings) -> dict[str, Any]:
    """Top-1 shares of zero-shot retrieval among all emoji, with the names that failed and what was found for them."""
    labels = [plain(row["name"]) for row in emoji.rows]
    count = len(labels)
    pictures = batched(count, settings.batch, lambda s: model.embed_image(emoji.pictures[s]))
    texts = batched(count, settings.batch, lambda s: model.clip.encode_text(labels[s]).embedding)
    similarity = F.normalize(texts, dim=1) @ F.normalize(pictures, dim=1).T
    report: dict[str, Any] = {"count": len(emoji.asked)}
    for key, found in (("name_to_picture", similarity.argmax(1)), ("picture_to_name", similarity.argmax(0))):
        wrong = [i for i in emoji.asked if emoji.drawing[found[i]] != emoji.drawing[i]]
        report[key] = 1 - len(wrong) / len(emoji.asked)
        report[f"wrong_{key}"] = [f"{labels[i]} → {labels[found[i]]}" for i in wrong]
    return report


def identity(model: Any, asked: Sequence[tuple[str, int]], emoji: Emoji, settings: Settings) -> dict[str, Any]:
    """Share of (prompt, index of its emoji) whose picture is nearest to that emoji, and the prompts that failed."""
    prompts = [prompt for prompt, _ in asked]
    right = emoji.is_nearest(sampled(model, prompts, settings), [index for _, index in asked])
    wrong = [prompt for prompt, ok in zip(prompts, right.tolist(), strict=True) if not ok]
    return {"count": len(prompts), "identity": right.float().mean().item(), "wrong": wrong}


def sampled(model: Any, prompts: list[str], settings: Settings) -> Tensor:
    """A 64 px picture a prompt, (B, 3, 64, 64) in [-1, 1]."""
    return batched(len(prompts), settings.batch, lambda s: model.sample(
        prompts[s], seed=settings.seed, output="tensor", size=64, **settings.options))  # fmt: skip


def names(model: Any, emoji: Emoji, settings: Settings) -> dict[str, Any]:
    """Identity over the plain names."""
    return identity(model, chosen([(plain(emoji.rows[i]["name"]), i) for i in emoji.asked], settings), emoji, settings)


def phrasings(model: Any, emoji: Emoji, settings: Settings) -> dict[str, Any]:
    """Identity over held-out phrasings, and over those of keywords alone, which do not hold the name."""
    asked = chosen(held_out(emoji), settings)
    report = identity(model, asked, emoji, settings)
    wrong = set(report["wrong"])
    keyed = [text for text, index in asked if plain(emoji.rows[index]["name"]).lower() not in text.lower()]
    if keyed:
        share = sum(text not in wrong for text in keyed) / len(keyed)
        report |= {"keyword_count": len(keyed), "keyword_identity": share}
    return report


def held_out(emoji: Emoji) -> list[tuple[str, int]]:
    """(phrasing, index of its emoji) of all that training never had."""
    found = [(text, index) for index in emoji.asked for text in emoji.rows[index].get("held_out", ())]
    if not found:
        raise PrepareError("The data set has no held-out phrasings; make it by prepare.py --captions natural.")
    return found


def prior(model: Any, emoji: Emoji, settings: Settings) -> dict[str, Any]:
    """Cosines of predicted and real embeddings on held-out phrasings; unrelated ones belong to the next emoji."""
    asked = chosen(held_out(emoji), settings)
    prompts, where = [text for text, _ in asked], torch.tensor([index for _, index in asked])
    predicted = batched(len(asked), settings.batch, lambda s: model.predict_embedding(prompts[s], seed=settings.seed))
    real = batched(len(asked), settings.batch, lambda s: model.embed_image(emoji.pictures[where[s]]))
    others = torch.arange(len(emoji.rows)).roll(len(emoji.rows) // 2)[where]
    unrelated = batched(len(asked), settings.batch, lambda s: model.embed_image(emoji.pictures[others[s]]))
    return {
        "count": len(asked),
        "cos_prediction_real": F.cosine_similarity(predicted, real).mean().item(),
        "cos_prediction_unrelated": F.cosine_similarity(predicted, unrelated).mean().item(),
        "cos_real_unrelated": F.cosine_similarity(real, unrelated).mean().item(),
    }


def varied(model: Any, seen: Tensor, targets: Sequence[int], emoji: Emoji, settings: Settings) -> Tensor:
    """Whether each variation of `seen` (B, 3, S, S) is nearest to its target emoji."""
    embeddings = batched(len(seen), settings.batch, lambda s: model.embed_image(seen[s]))
    drawn = batched(len(seen), settings.batch, lambda s: model.decode(
        embeddings[s], seed=settings.seed + 1, output="tensor", size=64, **settings.options))  # fmt: skip
    return emoji.is_nearest(drawn, targets)


def variations(model: Any, emoji: Emoji, settings: Settings) -> dict[str, Any]:
    """Identity of pictures drawn from each emoji's own embedding."""
    where = chosen(emoji.asked, settings)
    right = varied(model, emoji.pictures[where], where, emoji, settings)
    wrong = [emoji.rows[i]["name"] for i, ok in zip(where, right.tolist(), strict=True) if not ok]
    return {"count": len(where), "identity": right.float().mean().item(), "wrong": wrong}


def elsewhere(model: Any, emoji: Emoji, source: Path, settings: Settings) -> dict[str, Any]:
    """Identity of variations of restyled drawings, by style; the CLIP reduces them as it does a user's picture."""
    where = chosen(emoji.asked, settings)
    files = {row["name"]: source / row["file_name"] for row in read_rows(source)}
    report: dict[str, Any] = {"count": len(where)}
    for style in STYLES:
        rows = [emoji.rows[i] for i in where]
        seen = torch.stack([pixels(restyled(files[row["name"]], row["name"], style, SIZE)) for row in rows])
        report[style] = varied(model, seen, where, emoji, settings).float().mean().item()
    return report | {"identity": sum(report[style] for style in STYLES) / len(STYLES)}


def backgrounds(model: Any, emoji: Emoji, source: Path, settings: Settings) -> dict[str, Any]:
    """Shares of emoji drawn on coloured backgrounds right in emoji, background and both, by split."""
    eyes, named = Coloureds(source), {emoji.rows[i]["name"] for i in emoji.asked}
    report = {}
    for split in ("trained", "held_out"):
        if asked := [one for one in coloured(source, None, split) if one.name in named][: settings.count or 300]:
            drawn = sampled(model, [one.captions[0] for one in asked], settings)
            report[split] = judged_coloured(drawn, asked, eyes)
    return report


def scenes(
    model: Any, source: Path, settings: Settings, only: Sequence[str] | None = None, seed: int = 1
) -> dict[str, Any]:
    """Shares of scenes right in object, count, position, background and all of them, by split."""
    things = vocabulary(source, only)
    eyes = Judge(things)
    report: dict[str, Any] = {}
    for split in ("trained", "held_out"):
        asked = [scene(things, index, seed, split) for index in range(settings.count or 200)]
        prompts = [found.captions[0] for found in asked]
        report[split] = judged(eyes, asked, sampled(model, prompts, settings))
    return report


def judged(eyes: Judge, asked: Sequence[Scene], drawn: Tensor) -> dict[str, Any]:
    """Shares of pictures (B, 3, S, S) in [-1, 1] that show what was asked for."""
    verdicts = [judge(found, *eyes.find((image + 1) / 2)) for found, image in zip(asked, drawn, strict=True)]
    shares = {key: sum(getattr(v, key) for v in verdicts) / len(verdicts)
              for key in ("right", "objects", "count", "position", "background")}  # fmt: skip
    by_count: dict[str, float] = {}
    for total in SIZES:
        pairs = zip(verdicts, asked, strict=True)
        some = [verdict.right for verdict, found in pairs if sum(g.count for g in found.groups) == total]
        by_count |= {f"right_with_{total}": sum(some) / len(some)} if some else {}
    wrong = [found.captions[0] for found, verdict in zip(asked, verdicts, strict=True) if not verdict.right]
    return {"pictures": len(verdicts), **shares, **by_count, "wrong": wrong}


def upsamplers(model: Any, emoji: Emoji, source: Path, settings: Settings) -> dict[str, Any]:
    """PSNR in dB from true inputs a quarter as large, against Lanczos from the same input."""
    files = {row["name"]: source / row["file_name"] for row in read_rows(source)}
    picked = [files[emoji.rows[i]["name"]] for i in chosen(emoji.asked, settings)]
    report: dict[str, Any] = {"count": len(picked)}
    for size in (256, 1024):
        if size not in model.sizes:
            continue
        gains, ours, theirs = [], [], []
        for svg in picked:
            small, true = (rendered(svg, edge) for edge in (size // 4, size))
            up = model.upscale(small, size=size, seed=settings.seed, output="tensor")[0]
            lanczos = pixels(small.resize((size, size), Image.Resampling.LANCZOS))
            ours.append(psnr(up.cpu().clamp(-1, 1), pixels(true)))
            theirs.append(psnr(lanczos, pixels(true)))
            gains.append(ours[-1] - theirs[-1])
        report[str(size)] = {"psnr_db": mean(ours), "lanczos_db": mean(theirs), "gain_db": mean(gains)}
    return report


FROM_PICTURES = {"clip": clip, "names": names, "phrasings": phrasings, "prior": prior, "variations": variations}
FROM_VECTORS = {"elsewhere": elsewhere, "coloured": backgrounds, "upsamplers": upsamplers}

# ---------------------------------------------------------------- tools


def thumbnails(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 3·32·32)."""
    return F.interpolate(images.float().cpu(), (32, 32), mode="area").flatten(1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def batched(count: int, size: int, work: Callable[[slice], Tensor]) -> Tensor:
    return torch.cat([work(slice(i, min(i + size, count))).cpu() for i in range(0, count, size)])


def chosen(items: list[Any], settings: Settings) -> list[Any]:
    """`settings.count` of the items, always the same; all of them where it is 0."""
    if not settings.count or settings.count >= len(items):
        return items
    return random.Random(0).sample(items, settings.count)


def psnr(image: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]; at most 100."""
    error = (image.double() - true.double()).square().mean().item() / 4
    return min(100.0, -10 * torch.tensor(max(error, 1e-10)).log10().item())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pixels(picture: Image.Image) -> Tensor:
    from unclip.data import to_tensor

    return to_tensor(picture.convert("RGB"), picture.width)


def rendered(svg: Path, size: int) -> Image.Image:
    import io

    return Image.open(io.BytesIO(render(svg, size))).convert("RGB")


def read_emoji(folder: Path) -> Emoji:
    """The prepared folder; its pictures at 64 px."""
    from unclip.data import load_image, to_tensor

    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise PrepareError(f"{folder} has no metadata.jsonl; make the folder by prepare.py --captions natural.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pictures = torch.stack([to_tensor(load_image(folder / row["file_name"]), 64) for row in rows])
    return Emoji(rows, pictures, list(range(len(rows))))


def flat(report: dict[str, Any], above: str = "") -> dict[str, float]:
    """The numbers of a report by dotted name."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[above + key] = value
    return found


def markdown(report: dict[str, Any]) -> str:
    """A table of the figures; what is asked for stands beside those that have a threshold."""
    lines = ["| figure | measured | asked for | reached |", "|---|---|---|---|"]
    for key, value in flat({figure: report[figure] for figure in FIGURES if figure in report}).items():
        asked = ASKED.get(key)
        limit = "" if asked is None else f"≤ {-asked:g}" if asked < 0 else f"≥ {asked:g}"
        reached = "" if asked is None else "yes" if (value <= -asked if asked < 0 else value >= asked) else "no"
        shown = str(value) if isinstance(value, int) else f"{value:.3f}"
        lines.append(f"| {key.replace('_', ' ')} | {shown} | {limit} | {reached} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- command line


def measure(
    model: Any,
    wanted: Sequence[str],
    emoji: Emoji,
    source: Path | None,
    settings: Settings,
    scene_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The wanted figures by name. Raises PrepareError where one needs the vectors and there is no `source`."""
    report: dict[str, Any] = {}
    for figure in wanted:
        if figure in FROM_PICTURES:
            report[figure] = FROM_PICTURES[figure](model, emoji, settings)
        elif source is None:
            raise PrepareError(f"The figure {figure!r} needs the vectors: give --source.")
        elif figure == "scenes":
            report[figure] = scenes(model, source, settings, scene_names)
        else:
            report[figure] = FROM_VECTORS[figure](model, emoji, source, settings)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare.py from all emoji")
    parser.add_argument("--source", type=Path, help="folder with the vectors, for elsewhere, scenes and upsamplers")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--count", type=int, default=0, help="how many a figure, drawn with a fixed seed; 0 for all")
    parser.add_argument("--names", type=Path, help="file with the names to measure on")
    parser.add_argument("--scene-names", type=Path, default=SCENE_NAMES, help="file with the names of scenes' things")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--out", type=Path, help="folder for figures.json and figures.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write both files; returns the exit code."""
    args = parse(argv)
    from unclip import UnCLIP
    from unclip.errors import UnclipError

    keys = ("guidance", "prior_guidance", "decoder_steps", "sampler")
    options = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    settings = Settings(count=args.count, seed=args.seed, options=options)
    try:
        emoji = read_emoji(args.data)
        if args.names:
            only = read_names(args.names, [row["name"] for row in emoji.rows])
            emoji.asked = [index for index, row in enumerate(emoji.rows) if row["name"] in only]
        things = read_names(args.scene_names, [row["name"] for row in emoji.rows]) if "scenes" in args.figures else None
        model = UnCLIP.from_pretrained(args.model, size=None if "upsamplers" in args.figures else 64)
        report = measure(model, args.figures, emoji, args.source, settings, scene_names=things)
    except (PrepareError, UnclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {"model": args.model, "options": options, "seed": args.seed, **report}
    print(markdown(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "figures.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (args.out / "figures.md").write_text(markdown(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
