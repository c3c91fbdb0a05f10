"""Two models, or two settings of one, side by side for people who must not know which is which; and the votes counted.

Every prompt is drawn by both with the same seed. Which of the two stands on the left is drawn by chance and written
into a key that lies apart from the sheets; people write `left`, `right` or `tie` into a table.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip.bundle import read_json
from unclip.errors import UnclipError, UsageError
from unclip.evaluation.bootstrap import Interval, crossed_interval, mean_interval, sign_test, wilson
from unclip.evaluation.report import Figure, Report, Section, png, write_file

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

KIND = "pairs"
VOTES = "votes.csv"
ANSWERS = ("left", "right", "tie")
_GAP, _EDGE = 16, 256
_HOW = """Look at each sheet and write left, right or tie into the column `vote` of votes.csv: which of the two pictures
shows better what the line above them asks for? Where both do so alike, take the one that looks better.
"""


@dataclass(frozen=True)
class Side:
    """One of the two: its name in the key, the model, and fields of SampleOptions."""

    name: str
    system: UnCLIP
    options: dict[str, Any]


@dataclass(frozen=True)
class Tally:
    """Votes for A, for B and for neither; shares count a tie as half for each."""

    wins: int
    losses: int
    ties: int
    by_prompt: tuple[float, ...]
    """Share of each pair's voters that preferred A."""
    by_voter: np.ndarray
    """(voters, pairs): 1 for A, 0 for B, 0.5 for a tie, nan where there is no vote; voters without any are left out."""

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def several(self) -> bool:
        """Whether more than one has voted."""
        return len(self.by_voter) > 1

    @property
    def share(self) -> Interval:
        """Of all votes. One voter's votes are independent, and the interval is Wilson's; of several voters the votes on
        one pair go together, as do those of one voter, and the bootstrap resamples both.
        """
        if self.several:
            return crossed_interval(self.by_voter)
        return wilson(self.wins + self.ties / 2, self.votes)

    @property
    def share_by_prompt(self) -> Interval:
        """Mean over the pairs, bootstrap over them: what these voters, and no others, would say of other pairs."""
        return mean_interval(self.by_prompt)

    @property
    def chance(self) -> float:
        """Two-sided probability of so uneven a split of the pairs, were the two alike (sign test; ties left out)."""
        ahead = [share - 0.5 for share in self.by_prompt]
        return sign_test(sum(one > 0 for one in ahead), sum(one < 0 for one in ahead))


def sides(count: int, seed: int) -> list[bool]:
    """For each pair whether A stands on the left: half of them, in an order drawn with `seed`."""
    order = np.random.default_rng((seed, 0xB11D)).permutation(count)
    return [bool(place % 2 == 0) for place in order]


def make(
    first: Side,
    second: Side,
    prompts: Sequence[str],
    out: Path,
    key: Path,
    *,
    size: int,
    seed: int = 0,
    batch_size: int = 8,
    told: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write `out`/pair-0001.png …, votes.csv to be filled in and a word on how; and `key`, which tells the sides.

    Raises UsageError: the folder is not empty, the key is inside it or exists; nothing is drawn then.
    """
    check(out, key)
    left = sides(len(prompts), seed)
    digits = max(4, len(str(len(prompts))))
    pairs = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        drawn = [
            one.system.sample(part, seed=[seed + start + i for i in range(len(part))], size=size, **one.options)
            for one in (first, second)
        ]
        for i, prompt in enumerate(part):
            number = start + i
            name = f"pair-{number + 1:0{digits}d}"
            order = (0, 1) if left[number] else (1, 0)
            write_file(out / f"{name}.png", png(side_by_side([drawn[side][i] for side in order], prompt)))
            pairs.append({"pair": name, "prompt": prompt, "left": "a" if left[number] else "b", "seed": seed + number})
        told(min(start + batch_size, len(prompts)), len(prompts))
    body = {
        "kind": KIND,
        "a": {"name": first.name, "options": first.options},
        "b": {"name": second.name, "options": second.options},
        "size": size,
        "seed": seed,
        "pairs": pairs,
    }
    body["id"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["pair", "prompt", "vote"])
    writer.writerows([one["pair"], one["prompt"], ""] for one in pairs)
    write_file(key, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    write_file(out / "how-to-vote.txt", _HOW.encode("utf-8"))
    write_file(out / VOTES, table.getvalue().encode("utf-8"))


def check(out: Path, key: Path) -> None:
    """See that the sheets and the key can be written, and are apart."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnclipError(f"{out} is there already; name a folder that is new or empty")
    if key.exists():
        raise UnclipError(f"the key {key} is there already, and votes may be waiting for it; name another file")
    if out.resolve() in key.resolve().parents:
        raise UsageError(f"the key {key} would lie among the sheets in {out}, for voters to see; name a file elsewhere")


def side_by_side(pictures: Sequence[Image.Image], prompt: str) -> Image.Image:
    """Two pictures at the same size below their prompt, with the words left and right and nothing else."""
    edge = max(_EDGE, *(one.width for one in pictures))
    font = ImageFont.load_default(max(14, edge // 16))
    width = 2 * edge + 3 * _GAP
    lines = _wrapped(prompt, font, width - 2 * _GAP)
    line = int(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else 14
    top = _GAP + line * len(lines) + _GAP // 2
    canvas = Image.new("RGB", (width, top + edge + line + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        draw.text((_GAP, _GAP + number * line), text, fill="black", font=font)
    for side, (picture, word) in enumerate(zip(pictures, ("left", "right"), strict=True)):
        x = _GAP + side * (edge + _GAP)
        shown = picture.convert("RGB")
        if shown.width != edge:
            whole = edge % shown.width == 0
            shown = shown.resize((edge, edge), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
        canvas.paste(shown, (x, top))
        draw.text((x + edge // 2, top + edge + 2), word, fill="black", font=font, anchor="ma")
    return canvas


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def read_key(file: Path) -> dict[str, Any]:
    """The key of some pairs. UnclipError: it is none."""
    if not file.is_file():
        raise UnclipError(f"there is no key at {file}")
    body = read_json(file)
    if body.get("kind") != KIND or not isinstance(body.get("pairs"), list):
        raise UnclipError(f"{file} is no key of pairs")
    return body


def count(key: dict[str, Any], files: Sequence[Path]) -> Tally:
    """The votes of these tables, one a voter; pairs without a vote are left out.

    Raises UsageError: a pair that the key has not, one voted on twice in a table, another word than left, right or tie,
    no votes at all.
    """
    left = {one["pair"]: one["left"] for one in key["pairs"]}
    place = {pair: number for number, pair in enumerate(left)}
    table = np.full((len(files), len(left)), np.nan)
    for voter, file in enumerate(files):
        for pair, vote in _read_votes(file, left).items():
            share = 0.5 if vote == "tie" else float((vote == "left") == (left[pair] == "a"))
            table[voter, place[pair]] = share
    known = np.isfinite(table)
    if not known.any():
        raise UsageError(f"no vote in {', '.join(map(str, files))}; write left, right or tie into the column vote")
    table = table[known.any(1)][:, known.any(0)]
    wins, losses, ties = (int((table == share).sum()) for share in (1.0, 0.0, 0.5))
    return Tally(wins, losses, ties, tuple(np.nanmean(table, axis=0).tolist()), table)


def _read_votes(file: Path, known: dict[str, Any]) -> dict[str, str]:
    """The votes of one table, spreadsheets' separators and byte order marks included."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UnclipError(f"the votes {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    first = text.splitlines()[0] if text.strip() else ""
    separator = max(",;\t", key=first.count)
    rows = csv.DictReader(io.StringIO(text), delimiter=separator)
    if rows.fieldnames is None or not {"pair", "vote"} <= set(rows.fieldnames):
        raise UsageError(f"{file} has no columns pair and vote; its first line is {first!r}")
    found: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        pair, vote = (row["pair"] or "").strip(), (row["vote"] or "").strip().lower()
        if not vote:
            continue
        if pair not in known:
            raise UsageError(f"{file}, line {line}: the key has no pair {pair!r}")
        if vote not in ANSWERS:
            raise UsageError(f"{file}, line {line}: the vote is {vote!r}; expected {', '.join(ANSWERS)}, or nothing")
        if pair in found:
            raise UsageError(f"{file}, line {line}: {pair} has been voted on above; expected one line a pair")
        found[pair] = vote
    return found


def report(key: dict[str, Any], tally: Tally, voters: int) -> Report:
    """What the votes say, in words too."""
    a, b = key["a"]["name"], key["b"]["name"]
    share, pairs = tally.share, tally.share_by_prompt
    if min(share.low, pairs.low) > 0.5 and tally.chance < 0.05:
        verdict = f"{a} (A) is preferred."
    elif max(share.high, pairs.high) < 0.5 and tally.chance < 0.05:
        verdict = f"{b} (B) is preferred."
    else:
        verdict = "The votes do not tell the two apart."
    how = "bootstrap over voters and pairs" if tally.several else "Wilson"
    about = {
        "A": {"name": a, "options": key["a"]["options"]},
        "B": {"name": b, "options": key["b"]["options"]},
        "pairs": f"{len(tally.by_prompt)} of {len(key['pairs'])} voted on",
        "voters": voters,
    }
    result = Report("Side by side", about)
    result.figures = [
        Figure("share", "share of votes for A", share.value, note=f"{share.ends}, {how}"),
        Figure("share_by_pair", "mean of the pairs", pairs.value, note=f"{pairs.ends}, bootstrap over pairs"),
        Figure("p", "sign test over pairs", tally.chance, note="probability of such a split of alike models"),
    ]
    table = (["for A", "for B", "ties", "votes"], [[tally.wins, tally.losses, tally.ties, tally.votes]])
    result.sections = [Section("Votes", verdict, table)]
    result.values = {
        "votes": {"a": tally.wins, "b": tally.losses, "ties": tally.ties},
        "share": {**vars(share), "interval": how},
        "share_by_pair": vars(pairs),
        "sign_test": tally.chance,
        "verdict": verdict,
    }
    return result
