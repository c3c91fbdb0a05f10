#!/usr/bin/env python3
"""Turn a folder of emoji drawings (SVG) into an image-text data set that `unclip` can train on.

The source folder holds `metadata.jsonl` (file_name, emoji, name, keywords, group, skin_tone) and the SVG
files it names. Every emoji without a skin tone is drawn on a white square and gets a list of captions.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import multiprocessing
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from tqdm import tqdm

SHARD_SIZE = 256
MAX_CAPTIONS = 12
MARK = ".prepare.json"  # says which arguments made a folder, so that a stopped run can go on

PEOPLE = {"man", "woman", "person", "boy", "girl", "baby", "child"}
PLURALS = {"people", "men", "women", "children", "feet", "teeth", "mice", "couple"}
SINGULAR_S = {"bus", "cactus", "octopus", "lotus", "hibiscus", "abacus", "rhinoceros", "hippopotamus"}
ING_NOUNS = {"ring", "wing", "king", "building", "wedding", "dumpling", "earring", "painting", "pudding"}
PROPER = {"statue of liberty", "mount fuji", "map of japan", "kaaba", "milky way", "world map"}
NO_ARTICLE = {
    *("arrival", "bacon", "badminton", "baseball", "basketball", "bowling", "bread", "broccoli", "butter"),
    *("camping", "clothes", "construction", "coral", "corn", "dango", "departure", "dna", "done", "fire"),
    *("fog", "foggy", "food", "football", "garlic", "ginger", "hockey", "ice", "lacrosse", "lightning"),
    *("locked", "luggage", "mate", "meat", "milk", "money", "oden", "performing", "pong", "popcorn", "rice"),
    *("root", "sake", "salad", "santa", "soap", "softball", "sushi", "tennis", "thread", "unlocked"),
    *("volleyball", "voltage", "water", "wood", "yarn", "zzz"),
}  # fmt: skip
# Keywords about people's identity: they say nothing about what is drawn.
NOT_DRAWN = {"gay", "lesbian", "bisexual", "transgender", "genderqueer", "intersex", "lgbt", "lgbtq", "queer"}
HEAD_ENDS = {"with", "of", "in", "on", "at", "up", "down", "for", "behind", "over", "from", "into", "without",
             "wearing", "showing", "holding", "blowing", "fluttering"}  # fmt: skip


class PrepareError(Exception):
    """A problem the user can mend; its text is the whole message."""


@dataclass(frozen=True)
class Emoji:
    """One drawing to render and the metadata line that goes with it."""

    svg: Path
    stem: str
    meta: dict[str, Any]


# ---------------------------------------------------------------- captions


def plain(text: str) -> str:
    """Straighten curly apostrophes, so that a typed prompt and a caption agree."""
    return text.replace("’", "'").replace("‘", "'").strip()


def head_noun(name: str) -> str:
    """The word an article would belong to: the last one before a preposition or comma."""
    words = name.split()
    for i, word in enumerate(words):
        if i and word in HEAD_ENDS:
            return words[i - 1]
        if word.endswith(","):
            return word.rstrip(",")
    return words[-1]


def with_article(name: str, group: str) -> str | None:
    """`name` (lower case) after a or an; None for plurals, mass nouns, signs and proper names."""
    if not name or ":" in name or group in {"Symbols", "Flags", "Other"} or name in PROPER:
        return None
    first, head = name.split()[0], head_noun(name)
    if first in PLURALS or head in PLURALS or head in NO_ARTICLE or not head[-1].isalpha():
        return None
    if head.endswith("s") and not head.endswith("ss") and head not in SINGULAR_S:
        return None
    if head.endswith("ing") and head not in ING_NOUNS and first not in PEOPLE:
        return None
    says_you = name.startswith(("uni", "eu", "ewe", "one", "use", "ufo"))
    vowel = (name[0] in "aeiou" and not says_you) or name.startswith(("hour", "x-ray", "8"))
    return f"{'an' if vowel else 'a'} {name}"


def keyword_owners(rows: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    """Which emoji each keyword (or name) belongs to, over the whole set."""
    owners: dict[str, set[str]] = {}
    for row in rows:
        for word in {plain(w).lower() for w in [row["name"], *row["keywords"]]}:
            owners.setdefault(word, set()).add(row["name"])
    return owners


def build_captions(row: dict[str, Any], owners: dict[str, set[str]]) -> list[str]:
    """Natural phrasings for one emoji, the name first; nothing that would fit another emoji as well."""
    name = plain(row["name"]).lower()
    thing = with_article(name, row["group"])
    phrase = thing or name
    captions = [name, phrase, f"a picture of {phrase}", f"an emoji of {phrase}", f"{name} emoji"]
    in_name = {name, *name.replace(",", " ").replace(":", " ").split()}
    in_name |= {f"{w}s" for w in in_name}  # "dogs" says nothing that "dog" has not said
    words = dict.fromkeys(plain(k).lower() for k in row["keywords"] if k not in NOT_DRAWN)
    extra = [w for w in words if w not in in_name and len(w) > 1 and any(c.isalpha() for c in w)]
    extra.sort(key=lambda w: len(owners.get(w, ())))  # the rarest tell most; ties keep their order
    if len(extra) >= 2:
        captions.append(f"{name}, {extra[0]}, {extra[1]}")
    captions += [f"{name}, {w}" for w in extra[:2]]
    only = {row["name"]}
    captions += [w for w in extra if owners.get(w) == only and len(w) > 2][:3]
    pairs = [(a, b) for i, a in enumerate(extra) for b in extra[i + 1 :]]
    captions += [f"{a}, {b}" for a, b in pairs if owners.get(a, set()) & owners.get(b, set()) == only][:2]
    return list(dict.fromkeys(captions))[:MAX_CAPTIONS]


# ---------------------------------------------------------------- reading


def read_rows(source: Path) -> list[dict[str, Any]]:
    """The metadata lines without a skin tone; a name that comes twice is kept once and reported."""
    path = source / "metadata.jsonl"
    if not path.is_file():
        raise PrepareError(f"{source} has no metadata.jsonl, so it is not an emoji folder.")
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            toned = row["skin_tone"] is not None
            name = {k: row[k] for k in ("name", "file_name", "keywords", "group", "emoji")}["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise PrepareError(f"Line {number} of {path} cannot be used: {error!r}.") from error
        if toned:
            continue
        if name in rows:
            print(f"left out {row['file_name']}: the name {name!r} is taken", file=sys.stderr)
        rows.setdefault(name, row)
    return list(rows.values())


def read_names(path: Path, known: Iterable[str]) -> list[str]:
    """The names asked for, each checked against the names there are."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PrepareError(f"The names file {path} cannot be read: {error.strerror}.") from error
    exact = {plain(name): name for name in known}
    chosen: list[str] = []
    for line in lines:
        name = plain(line)
        if not name or name.startswith("#"):
            continue
        if name not in exact:
            near = difflib.get_close_matches(name, exact, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise PrepareError(f"{path} asks for {name!r}, which is not an emoji's name{hint}.")
        chosen.append(exact[name])
    if not chosen:
        raise PrepareError(f"The names file {path} names no emoji.")
    return list(dict.fromkeys(chosen))


def collect(source: Path, names_file: Path | None, natural: bool = False) -> list[Emoji]:
    """Everything to draw, in the source's order, with captions judged against the whole set."""
    rows = read_rows(source)
    owners = keyword_owners(rows)
    phrased = natural_captions(source, rows) if natural else {}
    wanted = None if names_file is None else set(read_names(names_file, [r["name"] for r in rows]))
    found = []
    for row in rows:
        if wanted is not None and row["name"] not in wanted:
            continue
        stem = Path(row["file_name"]).stem
        captions = phrased[row["name"]].captions if natural else build_captions(row, owners)
        meta = {"file_name": f"images/{stem}.png", "caption": captions[0], "captions": captions}
        if natural:
            meta |= {"held_out": phrased[row["name"]].held_out, "weak": phrased[row["name"]].weak}
        meta |= {key: row[key] for key in ("name", "keywords", "group", "emoji")}
        found.append(Emoji(source / row["file_name"], stem, meta))
    return found


def natural_captions(source: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The captions of phrasings.py by name; the colour words are measured on small renders."""
    from phrasings import colour_word, phrase_all  # beside this file; only this option needs it

    colours: dict[str, str | None] = {}
    for row in rows:
        try:
            colours[row["name"]] = colour_word(_draw(source / row["file_name"], width=32))
        except ValueError:  # broken: writing reports it
            colours[row["name"]] = None
    return phrase_all(rows, colours)


# ---------------------------------------------------------------- drawing


def render(svg: Path, size: int) -> bytes:
    """One SVG, centred on a white square, as the bytes of an RGB PNG."""
    drawn = _draw(svg, width=size)
    if drawn.height > size:
        drawn = _draw(svg, height=size)
    drawn.thumbnail((size, size), Image.Resampling.LANCZOS)  # guards against a rounded-up side
    if drawn.getchannel("A").getbbox() is None:
        raise ValueError("it draws nothing")
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2), drawn)
    out = io.BytesIO()
    canvas.save(out, "PNG", compress_level=6)
    return out.getvalue()


def _draw(svg: Path, **side: int) -> Image.Image:
    # System fonts are left out: the same file then gives the same picture on every machine.
    png = resvg_py.svg_to_bytes(svg_path=str(svg), skip_system_fonts=True, **side)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _render_job(job: tuple[Path, int]) -> bytes | str:
    """`render` for a worker: a broken drawing comes back as its reason, never as an exception."""
    try:
        return render(*job)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the renderer is no Exception
        return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def renderer(size: int, workers: int) -> Iterator[Any]:
    """A function that maps emoji to PNG bytes or a reason, in order, over `workers` processes."""

    def jobs(todo: Sequence[Emoji]) -> list[tuple[Path, int]]:
        return [(e.svg, size) for e in todo]

    if workers == 1:
        yield lambda todo: map(_render_job, jobs(todo))
        return
    with multiprocessing.Pool(workers) as pool:
        yield lambda todo: pool.imap(_render_job, jobs(todo), chunksize=4)


# ---------------------------------------------------------------- writing


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a hidden name first: a file with its final name is always whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def claim(out: Path, arguments: dict[str, Any]) -> None:
    """Make OUT ours, or go on with one that the same arguments began."""
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{out} is a file, not a folder.")
    mark = out / MARK
    text = json.dumps(arguments, sort_keys=True)
    if out.is_dir() and any(p.name != f".{MARK}.part" for p in out.iterdir()):
        if not mark.is_file() or mark.read_text(encoding="utf-8") != text:
            raise PrepareError(f"{out} is not empty and was not made with these arguments; choose another.")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(mark, text.encode())


def write_folder(out: Path, emoji: Sequence[Emoji], draw: Any) -> dict[str, str]:
    """The `imagefolder` layout of `datasets`; returns the broken drawings and why."""
    images = out / "images"
    images.mkdir(exist_ok=True)
    todo = [e for e in emoji if not (images / f"{e.stem}.png").exists()]
    broken: dict[str, str] = {}
    with tqdm(total=len(emoji), initial=len(emoji) - len(todo), unit="emoji") as bar:
        for item, png in zip(todo, draw(todo), strict=True):
            bar.update()
            if isinstance(png, str):
                broken[item.meta["name"]] = png
            else:
                write_atomic(images / f"{item.stem}.png", png)
    lines = [json.dumps(e.meta, ensure_ascii=False) + "\n" for e in emoji if e.meta["name"] not in broken]
    write_atomic(out / "metadata.jsonl", "".join(lines).encode())
    return broken


def write_webdataset(out: Path, emoji: Sequence[Emoji], size: int, draw: Any) -> dict[str, str]:
    """Tar shards in img2dataset's layout; returns the broken drawings and why."""
    broken: dict[str, str] = {}
    with tqdm(total=len(emoji), unit="emoji") as bar:
        for shard, start in enumerate(range(0, len(emoji), SHARD_SIZE)):
            items = emoji[start : start + SHARD_SIZE]
            path = out / f"{shard:05d}.tar"
            keys = [f"{shard:05d}{i:04d}" for i in range(len(items))]
            if path.exists():
                with tarfile.open(path) as tar:
                    have = set(tar.getnames())
                lost = [e for key, e in zip(keys, items, strict=True) if f"{key}.png" not in have]
                broken |= {e.meta["name"]: "it could not be drawn in an earlier run" for e in lost}
                bar.update(len(items))
                continue
            part = path.with_name(f".{path.name}.part")
            with tarfile.open(part, "w") as tar:
                for key, item, png in zip(keys, items, draw(items), strict=True):
                    bar.update()
                    if isinstance(png, str):
                        broken[item.meta["name"]] = png
                        continue
                    meta = {"key": key, "width": size, "height": size, **item.meta, "file_name": f"{key}.png"}
                    _add(tar, f"{key}.png", png)
                    _add(tar, f"{key}.txt", item.meta["caption"].encode())
                    _add(tar, f"{key}.json", json.dumps(meta, ensure_ascii=False).encode())
            part.replace(path)
    return broken


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# ---------------------------------------------------------------- command line


def positive(text: str) -> int:
    """An argparse type: a whole number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong usage ends with exit code 2."""
    parser = argparse.ArgumentParser(description="Render a folder of emoji SVGs as an image-text data set.")
    parser.add_argument("--source", type=Path, required=True, help="folder with metadata.jsonl and svg/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (new, or one to go on with)")
    parser.add_argument("--size", type=positive, default=1024, help="side of the square pictures in pixels")
    parser.add_argument("--names", type=Path, help="file with the names to keep, one per line (# comments)")
    parser.add_argument("--format", choices=("folder", "webdataset"), default="folder")
    parser.add_argument("--captions", choices=("names", "natural"), default="names", help="natural: phrasings.py")
    parser.add_argument("--workers", type=positive, default=2, help="processes that draw")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data set; returns the exit code."""
    args = parse(argv)
    try:
        emoji = collect(args.source, args.names, args.captions == "natural")
        wanted = json.dumps([e.meta for e in emoji], sort_keys=True).encode()
        digest = hashlib.sha256(wanted).hexdigest()
        claim(args.out, {"size": args.size, "format": args.format, "content": digest})
        with renderer(args.size, args.workers) as draw:
            if args.format == "folder":
                broken = write_folder(args.out, emoji, draw)
            else:
                broken = write_webdataset(args.out, emoji, args.size, draw)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, reason in broken.items():
        print(f"skipped {name!r}: {reason}", file=sys.stderr)
    groups = Counter(e.meta["group"] for e in emoji if e.meta["name"] not in broken)
    print(", ".join(f"{group}: {count}" for group, count in groups.most_common()))
    print(f"{len(emoji) - len(broken)} emoji in {args.out}, {len(broken)} broken and skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
