"""Which emoji stand where in a picture? The judge of drawn scenes, and the proof that it judges rightly.

    python examples/emoji/check_scenes.py --source my/noto-emoji --prove 500

Every emoji of the vocabulary, at the size that it has in a picture of one, two or three, is compared with every place
of the picture at 32 px (a matched filter: by how much does its drawing there explain the picture better than the plain
background?). The best are taken one after the other where they do not overlap; the number of emoji is the one whose
drawing leaves the least unexplained. The proof runs the judge on true renders, and on renders in which one thing was
changed while the old description was kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prepare import PrepareError, positive, read_names, read_rows
from scene_drawing import BACKGROUNDS, GRID, piece
from scene_vocabulary import Thing, vocabulary
from scenes import OPPOSITE, PLACES, SIZES, Scene, render, scene
from torch import Tensor
from torch.nn import functional as F

EXPLAINED = 0.35  # share of a drawing's energy that must be found in the picture
OVERLAP = 0.1  # of an emoji's edge: by so much two may overlap


@dataclass(frozen=True)
class Found:
    """An emoji found in a picture: its name and centre in units of 1/32 of the side."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """What of a scene's description holds in a picture."""

    objects: bool
    count: bool
    position: bool
    background: bool

    @property
    def right(self) -> bool:
        return self.objects and self.count and self.position and self.background


class Judge:
    """Finds the emoji of a vocabulary in pictures."""

    def __init__(self, things: Sequence[Thing]) -> None:
        self.names = [thing.name for thing in things]
        self._filters: dict[int, tuple[Tensor, Tensor]] = {}
        for edge in SIZES.values():
            rgba = np.stack([_premultiplied(thing.svg, edge) for thing in things])
            drawn = torch.from_numpy(rgba).permute(0, 3, 1, 2)  # (K, 4, edge, edge)
            self._filters[edge] = (drawn[:, :3].contiguous(), drawn[:, 3:].contiguous())

    def find(self, picture: Tensor) -> tuple[str, list[Found]]:
        """Background colour and emoji of a picture (3, S, S) in [0, 1]."""
        small = F.interpolate(picture[None], (GRID, GRID), mode="area") if picture.shape[-1] != GRID else picture[None]
        name, colour = background_of(small[0])
        rest = small - colour[None, :, None, None]
        plain = rest.square().sum().item()
        best: tuple[float, list[Found]] = (plain, [])
        for count, edge in SIZES.items():
            explained, found = self._explain(rest, colour, count, edge)
            if len(found) == count and plain - explained < best[0]:
                best = (plain - explained, found)
        return name, best[1]

    def _explain(self, rest: Tensor, colour: Tensor, count: int, edge: int) -> tuple[float, list[Found]]:
        """The `count` best emoji of one size, and how much of the squared difference they explain."""
        drawn, alpha = self._filters[edge]
        # ⟨x - b, αc - αb⟩ and |αc - αb|², from filters that do not know the background b.
        tinted = (rest * colour[None, :, None, None]).sum(1, keepdim=True)
        match = F.conv2d(rest, drawn)[0] - F.conv2d(tinted, alpha)[0]  # (K, H, W)
        energy = (drawn - alpha * colour[None, :, None, None]).square().sum((1, 2, 3))[:, None, None]
        gain = 2 * match - energy
        gain = torch.where(gain > (2 * EXPLAINED - 1) * energy, gain, torch.full_like(gain, -torch.inf))
        top, which = gain.max(0)  # (H, W)
        ys, xs = torch.meshgrid(torch.arange(top.shape[0]), torch.arange(top.shape[1]), indexing="ij")
        found: list[Found] = []
        total = 0.0
        for _ in range(count):
            place = int(top.argmax())
            y, x = divmod(place, top.shape[1])
            if not torch.isfinite(top[y, x]):
                break
            total += top[y, x].item()
            found.append(Found(self.names[int(which[y, x])], x + edge / 2, y + edge / 2))
            near = torch.maximum((ys - y).abs(), (xs - x).abs()) < edge * (1 - OVERLAP)
            top = top.masked_fill(near, -torch.inf)
        return total, found


def _premultiplied(svg: str, edge: int) -> np.ndarray:
    """One emoji at `edge` pixels, reduced from twice that as pictures are; colours times alpha."""
    rgba = np.asarray(piece(svg, edge * 2), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba.reshape(edge, 2, edge, 2, 4).mean((1, 3))


def background_of(picture: Tensor) -> tuple[str, Tensor]:
    """The named background nearest to the commonest colour at the picture's edges, and that colour itself."""
    ring = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)  # (3, N)
    colour = ring.median(dim=1).values
    return nearest_background(colour), colour


def nearest_background(colour: Tensor) -> str:
    """The name of the background nearest to a colour (3,) in [0, 1]."""
    names = list(BACKGROUNDS)
    table = torch.tensor([BACKGROUNDS[name] for name in names], dtype=torch.float32) / 255
    return names[int((table - colour).square().sum(1).argmin())]


def judge(expected: Scene, background: str, found: Sequence[Found]) -> Verdict:
    """Compare what was found with a description; positions are judged by centres."""
    wanted = Counter({group.name: group.count for group in expected.groups})
    seen = Counter(item.name for item in found)
    objects, count = set(wanted) == set(seen), sum(wanted.values()) == len(found)
    right = objects and wanted == seen and _placed(expected, found)
    return Verdict(objects, count and (wanted == seen or not objects), right, background == expected.background)


def _placed(expected: Scene, found: Sequence[Found]) -> bool:
    relation = expected.relation
    at = [[item for item in found if item.name == group.name] for group in expected.groups]
    if relation in PLACES:
        across, along = _third(at[0][0].x), _third(at[0][0].y)
        words = set(relation.split()) - {"middle"}
        return words == {w for w in (("left", "", "right")[across], ("top", "", "bottom")[along]) if w}
    if relation in OPPOSITE:
        first, second = ([(i.x if relation in {"left of", "right of"} else i.y) for i in items] for items in at)
        return max(first) < min(second) if relation in {"left of", "above"} else min(first) > max(second)
    items = [item for group in at for item in group]
    sideways = relation == "row"
    main = [item.x if sideways else item.y for item in items]
    cross = [item.y if sideways else item.x for item in items]
    ordered = len(expected.groups) == 1 or main == sorted(main)
    return ordered and max(main) - min(main) > max(cross) - min(cross)


def _third(centre: float) -> int:
    return 0 if centre < 12.5 else 2 if centre > 19.5 else 1


# ---------------------------------------------------------------- proof


def altered(found: Scene, things: Sequence[Thing], number: int) -> Scene:
    """The scene with one thing wrong: another emoji, one fewer, mirrored, or another background."""
    first = found.groups[0]
    kinds = ["object", "background", *(["count"] if first.count > 1 else []), *(["mirror"] if _mirrors(found) else [])]
    kind = kinds[number % len(kinds)]
    if kind == "object":
        names = {group.name for group in found.groups}
        others = [thing for thing in things if thing.name not in names and found.background in thing.backgrounds]
        other = others[number % len(others)]
        return replace(found, groups=(replace(first, name=other.name), *found.groups[1:]))
    if kind == "count":
        return replace(found, groups=(replace(first, boxes=first.boxes[1:]), *found.groups[1:]))
    if kind == "mirror":
        flip = [replace(g, boxes=tuple((GRID - x - e, GRID - y - e, e) for x, y, e in g.boxes)) for g in found.groups]
        return replace(found, groups=tuple(flip))
    backgrounds = [b for b in BACKGROUNDS if b != found.background]
    return replace(found, background=backgrounds[number % len(backgrounds)])


def _mirrors(found: Scene) -> bool:
    return len(found.groups) > 1 or (found.relation in PLACES and found.relation != "middle")


def worn(picture: Tensor, number: int) -> Tensor:
    """A picture as a weak model might draw it: softened by 3×3 means, and with noise of deviation 0.05."""
    soft = F.avg_pool2d(F.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(number))
    return (soft + 0.05 * noise).clamp(0, 1)


def prove(things: Sequence[Thing], count: int, size: int, seed: int = 1, wear: bool = False) -> dict[str, Any]:
    """Shares of true renders judged right, and of altered ones judged wrong; the misjudged are named."""
    eyes = Judge(things)
    by_name = {thing.name: thing for thing in things}
    parts: Counter[str] = Counter()
    misjudged: list[str] = []
    caught = 0
    for index in range(count):
        expected = scene(things, index, seed, "held_out" if index % 2 else "trained")
        picture = to_tensor(render(expected, by_name, size))
        seen = eyes.find(worn(picture, index) if wear else picture)
        verdict = judge(expected, *seen)
        parts.update(key for key, ok in asdict(verdict).items() if ok)
        if not verdict.right:
            misjudged.append(f"{expected.captions[0]}: {seen[0]}, {', '.join(item.name for item in seen[1])}")
        wrong = to_tensor(render(altered(expected, things, index), by_name, size))
        caught += not judge(expected, *eyes.find(worn(wrong, index) if wear else wrong)).right
    return {
        "scenes": count,
        "size": size,
        "worn": wear,
        "true_right": 1 - len(misjudged) / count,
        **{f"true_{key}": parts[key] / count for key in ("objects", "count", "position", "background")},
        "altered_caught": caught / count,
        "misjudged": misjudged,
    }


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255).permute(2, 0, 1).contiguous()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the proof as JSON; exit code 1 where fewer than 99 % are judged rightly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with metadata.jsonl and svg/")
    parser.add_argument("--names", type=Path, help="file with the names to use, one per line (# comments)")
    parser.add_argument("--prove", type=positive, default=500, help="how many scenes")
    parser.add_argument("--size", type=positive, default=64)
    parser.add_argument("--worn", action="store_true", help="on softened and noisy pictures")
    args = parser.parse_args(argv)
    try:
        names = read_names(args.names, [row["name"] for row in read_rows(args.source)]) if args.names else None
        report = prove(vocabulary(args.source, names), args.prove, args.size, wear=args.worn)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2, ensure_ascii=False))
    return 0 if min(report["true_right"], report["altered_caught"]) >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
