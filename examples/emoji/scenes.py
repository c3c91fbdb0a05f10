"""Endless captioned scenes: one to three emoji on a coloured background, with the truth beside every picture.

    python examples/emoji/scenes.py --source my/noto-emoji --out data/scenes_64 --count 50000 --size 64
    python examples/emoji/scenes.py --source my/noto-emoji --list-held-out held_out.json

A scene follows from (seed, index) alone and is a description in units of 1/32 of the side, so that one scene is the
same picture at every size. `--out` gets webdataset tars, which `data.source` reads; the truth is each sample's JSON.

What is held out is a function of hashes: of every emoji some counts, places and backgrounds, and some pairs of emoji.
A scene with any of these facets belongs to the split `held_out`; `trained` has none of them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nouns import indefinite
from phrasings import count_phrase, pick
from PIL import Image
from prepare import PrepareError, claim, positive, read_names, read_rows
from scene_drawing import BACKGROUNDS, GRID, draw_scene, write_shard
from scene_vocabulary import Thing, vocabulary

SHARD = 1000
HELD_PER_MILLE = 30
SIZES = {1: 18, 2: 13, 3: 10}  # edge of an emoji, by how many there are in the picture
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {  # of a single emoji: its words, and ranges of its left and top edge
    "middle": ("in the middle", (6, 8), (6, 8)),
    "left": ("on the left", (0, 1), (5, 9)),
    "right": ("on the right", (13, 14), (5, 9)),
    "top": ("at the top", (5, 9), (0, 1)),
    "bottom": ("at the bottom", (5, 9), (13, 14)),
    "top left": ("in the top left corner", (0, 1), (0, 1)),
    "top right": ("in the top right corner", (13, 14), (0, 1)),
    "bottom left": ("in the bottom left corner", (0, 1), (13, 14)),
    "bottom right": ("in the bottom right corner", (13, 14), (13, 14)),
}
ROWS = {"row": ("side by side", "in a row"), "column": ("one above the other", "in a column")}


@dataclass(frozen=True)
class Group:
    """Some pieces of one emoji; boxes are (left, top, edge) in units of 1/32 of the side."""

    name: str
    noun: str
    count: int
    place: str
    boxes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `relation` is of the first group to the second, or how one group or three stand."""

    background: str
    relation: str
    groups: tuple[Group, ...]
    captions: tuple[str, ...]
    held_out: tuple[str, ...]  # the facets that keep the scene out of training


# ---------------------------------------------------------------- held-out combinations


def facets(background: str, groups: Sequence[tuple[str, int, str]]) -> list[str]:
    """The combinations in a scene of (name, count, place) groups that may be held out."""
    found = []
    for name, count, place in groups:
        found += [f"{name} × {count}", f"{name} @ {place}", f"{name} on {background}"]
    names = sorted(name for name, _, _ in groups)
    return found + [f"{a} + {b}" for i, a in enumerate(names) for b in names[i + 1 :]]


def is_held_out(facet: str) -> bool:
    return pick(f"held out: {facet}", 1000) < HELD_PER_MILLE


def all_held_out(things: Sequence[Thing]) -> dict[str, list[str]]:
    """Every held-out combination of a vocabulary, by kind."""
    names = [thing.name for thing in things]
    places = [*PLACES, *ROWS, *RELATIONS, "first", "second", "third"]
    kinds = {
        "counts": [f"{n} × {count}" for n in names for count in SIZES],
        "places": [f"{n} @ {place}" for n in names for place in places],
        "backgrounds": [f"{thing.name} on {b}" for thing in things for b in thing.backgrounds],
        "pairs": [f"{a} + {b}" for i, a in enumerate(sorted(names)) for b in sorted(names)[i + 1 :]],
    }
    return {kind: [facet for facet in found if is_held_out(facet)] for kind, found in kinds.items()}


# ---------------------------------------------------------------- one scene


def scene(things: Sequence[Thing], index: int, seed: int = 0, split: str = "trained", tidy: bool = False) -> Scene:
    """Scene number `index`; `split` is "trained" or "held_out". Equal arguments give equal scenes.

    A `tidy` one has every emoji in the very middle of its place, so that its caption says all there is to know.
    """
    for attempt in range(10_000):
        found = _draw_lots(things, random.Random(f"{seed}/{index}/{attempt}"), tidy)
        if found is not None and bool(found.held_out) == (split == "held_out"):
            return found
    raise PrepareError(f"No scene of the split {split!r} can be made of {len(things)} emoji.")


def alike(
    things: Sequence[Thing], family: int, count: int, seed: int = 0, split: str = "trained", tidy: bool = False
) -> list[Scene]:
    """`count` scenes of the same emoji on the same background, no two of which say the same: places and numbers are
    what tells them apart, and what a CLIP has to learn beside what there is.
    """
    for attempt in range(1000):
        rng = random.Random(f"{seed}/family {family}/{attempt}")
        like, found = None, dict[Any, Scene]()
        for _ in range(20 * count):
            one = _draw_lots(things, rng, tidy, like)
            if one is not None and bool(one.held_out) == (split == "held_out"):
                like = like or one
                line = one.relation if one.relation in ROWS else ""  # "left of" and "right of" say one thing
                found.setdefault((line, *sorted((g.name, g.count, g.place) for g in one.groups)), one)
            if len(found) == count:
                return list(found.values())
    raise PrepareError(f"No {count} scenes of the split {split!r} that are alike can be made of {len(things)} emoji.")


def _draw_lots(things: Sequence[Thing], rng: random.Random, tidy: bool, like: Scene | None = None) -> Scene | None:
    background = like.background if like else rng.choice(list(BACKGROUNDS))
    possible = ((1,), (2,), (3,), (1, 1), (1, 1), (1, 2), (2, 1), (1, 1, 1))
    if like:
        names = {group.name for group in like.groups}
        things = [thing for thing in things if thing.name in names]
        possible = tuple(one for one in possible if len(one) == len(names))
    counts = rng.choice(possible)
    if len(things) < len(counts):
        return None
    chosen = rng.sample(list(things), len(counts))
    if any(background not in thing.backgrounds for thing in chosen):
        return None
    if len(counts) == 1:
        relation = rng.choice(list(PLACES if counts[0] == 1 else ROWS))
        places: tuple[str, ...] = (relation,)
    elif len(counts) == 2:
        relation = rng.choice(RELATIONS)
        places = (relation, OPPOSITE[relation])
    else:
        relation = rng.choice(list(ROWS))
        places = ("first", "second", "third")
    boxes = _boxes(counts, relation, None if tidy else rng)
    groups = tuple(
        Group(thing.name, thing.noun, count, place, tuple(box))
        for thing, count, place, box in zip(chosen, counts, places, boxes, strict=True)
    )
    held = [facet for facet in facets(background, [(g.name, g.count, g.place) for g in groups]) if is_held_out(facet)]
    return Scene(background, relation, groups, _captions(background, relation, groups, tidy), tuple(held))


def _boxes(counts: Sequence[int], relation: str, rng: random.Random | None) -> list[list[tuple[int, int, int]]]:
    """Boxes of each group, without a generator in the middle of their places. Neighbours are a unit or more apart."""

    def lot(low: int, high: int) -> int:
        return rng.randint(low, high) if rng else (low + high) // 2

    total = sum(counts)
    edge = SIZES[total]
    if total == 1:
        _, across, along = PLACES[relation]
        return [[(lot(*across), lot(*along), edge)]]
    sideways = relation in {"left of", "right of", "row"}
    slot = GRID / (total if max(counts) == total or len(counts) == 3 else 2)
    spare = max(int(slot) - edge - 1, 0)
    drift = lot(-2, 2)

    def place(main: float, cross: float) -> tuple[int, int, int]:
        a = round(main - edge / 2 + lot(0, spare) - spare / 2)
        b = round(cross - edge / 2) + drift + lot(-1, 1)
        a, b = (min(max(v, 0), GRID - edge) for v in (a, b))
        return (a, b, edge) if sideways else (b, a, edge)

    middle = GRID / 2
    if len(counts) != 2:
        spots = [place(slot * (i + 0.5), middle) for i in range(total)]
        return [spots] if len(counts) == 1 else [[spot] for spot in spots]
    order = (0, 1) if relation in {"left of", "above"} else (1, 0)
    found = []
    for count, half in zip(counts, order, strict=True):
        crosses = [middle] if count == 1 else [middle - 7, middle + 7]
        found.append([place(slot * (half + 0.5), cross) for cross in crosses])
    return found


def _captions(background: str, relation: str, groups: Sequence[Group], tidy: bool) -> tuple[str, ...]:
    """What people might write; the first says all. In a tidy scene what is left unsaid has one meaning: in the middle,
    side by side, on white."""
    where = f"on {indefinite(background)} background"
    said = [count_phrase(group.noun, group.count) for group in groups]
    if len(groups) == 1 and groups[0].count == 1:
        place = PLACES[relation][0]
        vague = (f"{said[0]} {where}",) if not tidy or relation == "middle" else ()
        return (f"{said[0]} {place} {where}", f"{said[0]} {where}, {place}", *vague)
    if len(groups) == 1:
        side, line = ROWS[relation]
        whole = [f"{said[0]} {side if groups[0].count == 2 else line}"]
        whole += [said[0]] if not tidy or relation == "row" else []
    elif len(groups) == 2:
        long = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "under"}
        first, second = said
        whole = [f"{first} {way} {second}" for way in (relation, long[relation])]
        whole += [f"{second} {OPPOSITE[relation]} {first}"]
    else:
        way = "from left to right" if relation == "row" else "from top to bottom"
        whole = [f"{said[0]}, {said[1]} and {said[2]} {way}"]
        whole += [f"{said[0]}, {said[1]} and {said[2]}"] if tidy and relation == "row" else []
    bare = whole[:1] if tidy and background == "white" else []
    return (*(f"{text} {where}" for text in whole), *bare)


def truth(found: Scene) -> dict[str, Any]:
    """The scene as JSON: what stands where, the captions, and what is held out."""
    return {"caption": found.captions[0], **asdict(found)}


# ---------------------------------------------------------------- many scenes


def render(found: Scene, things: dict[str, Thing], size: int) -> Image.Image:
    """The scene at `size` pixels, drawn from the vectors at exactly that size."""
    boxes = [(things[group.name].svg, box) for group in found.groups for box in group.boxes]
    return draw_scene(boxes, BACKGROUNDS[found.background], size)


@dataclass(frozen=True)
class Wanted:
    """Which scenes are to be drawn, and at what size; each `alike` neighbours are of a family."""

    size: int = 64
    seed: int = 0
    split: str = "trained"
    tidy: bool = False
    alike: int = 1

    def scenes(self, things: Sequence[Thing], first: int, last: int) -> Iterator[tuple[int, Scene]]:
        """Numbers and scenes from `first`, a multiple of `alike`, up to `last`."""
        if self.alike == 1:
            yield from ((i, scene(things, i, self.seed, self.split, self.tidy)) for i in range(first, last))
            return
        for family in range(first // self.alike, -(-last // self.alike)):
            found = alike(things, family, self.alike, self.seed, self.split, self.tidy)
            yield from ((i, one) for i, one in enumerate(found, family * self.alike) if i < last)


def samples(
    things: Sequence[Thing], first: int, last: int, wanted: Wanted
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """(key, PNG, truth) of the scenes from `first` up to `last`."""
    by_name = {thing.name: thing for thing in things}
    how = {"seed": wanted.seed, "split": wanted.split, "tidy": wanted.tidy, "alike": wanted.alike}
    for index, found in wanted.scenes(things, first, last):
        out = io.BytesIO()
        render(found, by_name, wanted.size).save(out, "PNG", compress_level=3)
        yield f"{index:09d}", out.getvalue(), {"index": index, **how, **truth(found)}


def _shard(job: tuple[int, int], *, things: Sequence[Thing], out: Path, wanted: Wanted) -> int:
    first, last = job
    path = out / f"{first // SHARD:06d}.tar"
    if not path.exists():
        write_shard(path, samples(things, first, last, wanted))
    return last - first


def write(things: Sequence[Thing], out: Path, count: int, wanted: Wanted, workers: int) -> None:
    """Tars of 1,000 scenes each; a stopped run goes on with the first missing tar."""
    claim(out, {"scenes": count, **asdict(wanted), "things": [thing.name for thing in things]})
    jobs = [(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    work = partial(_shard, things=list(things), out=out, wanted=wanted)
    if workers == 1:
        _report(map(work, jobs), count)
        return
    with multiprocessing.Pool(workers) as pool:
        _report(pool.imap_unordered(work, jobs), count)


def _report(numbers: Iterable[int], count: int) -> None:
    done = 0
    for number in numbers:
        done += number
        print(f"{done} of {count} scenes", file=sys.stderr)


def sheet(things: Sequence[Thing], count: int, wanted: Wanted) -> Image.Image:
    """The first scenes side by side, eight a row."""
    by_name = {thing.name: thing for thing in things}
    across, size = min(count, 8), wanted.size
    found = Image.new("RGB", (across * size, -(-count // across) * size), "white")
    for index, one in wanted.scenes(things, 0, count):
        found.paste(render(one, by_name, size), (index % across * size, index // across * size))
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with metadata.jsonl and svg/")
    parser.add_argument("--names", type=Path, help="file with the names to use, one per line (# comments)")
    parser.add_argument("--out", type=Path, help="folder for the tars (new, or one to go on with)")
    parser.add_argument("--count", type=positive, default=10_000)
    parser.add_argument("--size", type=positive, default=64, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("trained", "held_out"), default="trained")
    parser.add_argument("--tidy", action="store_true", help="every emoji in the very middle of its place")
    same = "so many neighbours have the same emoji and background"
    parser.add_argument("--alike", type=int, choices=(1, 2, 4, 5, 8), default=1, help=same)
    parser.add_argument("--workers", type=positive, default=2, help="processes that draw")
    parser.add_argument("--list-held-out", type=Path, metavar="FILE", help="write the held-out combinations as JSON")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write the first scenes as one picture instead")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write what was asked for; returns the exit code."""
    args = parse(argv)
    wanted = Wanted(args.size, args.seed, args.split, args.tidy, args.alike)
    try:
        if not (args.out or args.sheet or args.list_held_out):
            raise PrepareError("Nothing to do: give --out, --sheet or --list-held-out.")
        known = [row["name"] for row in read_rows(args.source)]
        things = vocabulary(args.source, read_names(args.names, known) if args.names else None)
        print(f"{len(things)} emoji to make scenes of", file=sys.stderr)
        if args.list_held_out:
            text = json.dumps(all_held_out(things), ensure_ascii=False, indent=1)
            args.list_held_out.write_text(text + "\n", encoding="utf-8")
        if args.sheet:
            sheet(things, min(args.count, 64), wanted).save(args.sheet)
        if args.out:
            write(things, args.out, args.count, wanted, args.workers)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
