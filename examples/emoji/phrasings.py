"""Captions as people would type them, made by rules from an emoji's name, keywords and picture.

`prepare.py --captions natural` writes them. A phrasing goes to one emoji only: what would fit two is given to neither,
since it would teach the model their average. Some phrasings of each emoji are held out of training, to be asked for
later; their words all occur in phrasings that stay. No chance is involved: choices follow from hashes of the names.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from nouns import CALLED, EXTRA, OPEN_ARTICLE, PAIRS, SYNONYM_ADJECTIVES, indefinite, plural
from PIL import Image
from prepare import NOT_DRAWN, keyword_owners, plain, with_article

MAX_CAPTIONS = 20  # more only where a held-out phrasing needs their words
WEAK_FROM = 5  # a keyword of so many emoji says next to nothing
CARRIERS = (
    "a picture of {}", "an emoji of {}", "a drawing of {}", "an image of {}", "{} on a white background",
    "a cartoon of {}", "an icon of {}", "{}, flat drawing",
)  # fmt: skip
# Saturated hues by the angle in degrees where the next one begins.
HUES = ((14, "red"), (40, "orange"), (68, "yellow"), (166, "green"), (255, "blue"), (312, "purple"), (344, "pink"))
COLOURS = {*(name for _, name in HUES), "black", "white", "grey", "brown", "beige", "golden", "silver"}
MOSTLY = 0.6  # share of the drawn pixels that makes a colour the picture's
UNSEEN = NOT_DRAWN | {"glbt", "glbtq", "lgbtqia"}
TIMES = re.compile(r" o'clock$|-thirty$")
FACES = re.compile(r"\b(face|faces)\b")


@dataclass
class Phrased:
    """What one emoji is called: captions to train on, phrasings held out, and keywords too common to use."""

    captions: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)


def pick(key: str, count: int) -> int:
    """A number below `count` that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % count


# ---------------------------------------------------------------- colours


def colour_shares(drawn: Image.Image) -> dict[str, float]:
    """Share of each named colour among the opaque pixels of an RGBA picture; empty where there are none."""
    pixels = np.asarray(drawn.convert("RGBA")).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 128][:, :3].astype(np.float64) / 255
    if not len(pixels):
        return {}
    high, low = pixels.max(1), pixels.min(1)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = pixels.T
    hue = np.select(
        [high == red, high == green],
        [((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    ) * 60
    names = np.full(len(pixels), "red", dtype="<U8")
    for (start, _), (_, name) in pairwise(HUES):
        names[hue >= start] = name
    names[hue >= HUES[-1][0]] = "red"
    # A dark or dull orange is what people call brown, a pale one beige, and a dull blue grey.
    purity = chroma / np.maximum(high, 0.35)
    warm = (hue >= 5) & (hue < 50)
    names[warm & ((high < 0.72) | ((high < 0.93) & (purity < 0.72)))] = "brown"
    names[warm & (high >= 0.85) & (purity < 0.42)] = "beige"
    names[((hue >= 335) | (hue < 12)) & (high >= 0.85) & (purity < 0.5)] = "pink"
    grey = purity < np.where((hue >= 170) & (hue < 260), 0.3, 0.16)
    names[grey] = np.select([high[grey] > 0.82, high[grey] < 0.32], ["white", "black"], "grey")
    return {name: count / len(names) for name, count in Counter(names.tolist()).most_common()}


def colour_word(drawn: Image.Image) -> str | None:
    """The colour a picture is mostly of, "red and white" for two; None for a motley one."""
    shares = list(colour_shares(drawn).items())
    if not shares:
        return None
    if shares[0][1] >= MOSTLY:
        return shares[0][0]
    if len(shares) > 1 and shares[0][1] + shares[1][1] >= 0.85 and shares[1][1] >= 0.3:
        return f"{shares[0][0]} and {shares[1][0]}"
    return None


# ---------------------------------------------------------------- names


def noun(name: str, group: str) -> str | None:
    """What one piece of the thing is called, countable and without article; None where nothing can be counted."""
    name = plain(name)
    if name in CALLED:
        return CALLED[name]
    if TIMES.search(name):
        return None
    thing = with_article(name.lower(), group)
    if thing is not None:
        return restore_capitals(thing.split(" ", 1)[1], name)
    if group in {"Symbols", "Flags", "Other"} and ":" not in name and name.split()[-1] in OPEN_ARTICLE:
        return name
    return None


def restore_capitals(text: str, name: str) -> str:
    """Proper names keep their capitals ("Tokyo tower"); all else is lower case as typed."""
    return name if text == name.lower() else text


def thing_of(name: str, group: str) -> str:
    """The name as it stands in a sentence: with article, as "a pair of", or bare for plurals and mass nouns."""
    if (one := noun(name, group)) is not None:
        return indefinite(one)
    name = plain(name)
    return f"a pair of {name}" if name in PAIRS else name


def reworded(name: str, group: str) -> list[str]:
    """Whole phrases for names that follow a pattern ("man: red hair", "keycap: 5", "two o'clock")."""
    name = plain(name)
    who, _, what = name.partition(": ")
    found: list[str] = []
    if match := re.fullmatch(r"(.*): facing right", name):
        found = [f"{indefinite(match[1])} facing right", f"{indefinite(match[1])} going to the right"]
    elif who == "keycap":
        found = [f"the number {what} on a key" if what.isdigit() else f"the sign {what} on a key", f"the key {what}"]
    elif what in {"red hair", "curly hair", "white hair", "blond hair", "beard"}:
        tail = "a beard" if what == "beard" else what
        found = [f"a {who} with {tail}", f"a {'bearded' if what == 'beard' else f'{what.split()[0]}-haired'} {who}"]
    elif what == "bald":
        found = [f"a bald {who}", f"a {who} without hair"]
    elif who in {"family", "kiss", "couple with heart"} and what:
        people = [indefinite(person) for person in what.split(", ")]
        joined = f"{', '.join(people[:-1])} and {people[-1]}" if len(people) > 1 else people[0]
        opening = {"family": "a family of", "kiss": "a kiss between", "couple with heart": "a heart between"}[who]
        found = [f"{opening} {joined}"]
    elif match := re.fullmatch(r"(\S+) o'clock", name):
        found = [f"a clock showing {name}", f"a clock at {match[1]}"]
    elif re.fullmatch(r"\S+-thirty", name):
        found = [f"a clock showing {name}", f"a clock at half past {name.removesuffix('-thirty')}"]
    elif match := re.fullmatch(r"(?:Japanese )?[“\"]?(.+?)[”\"]? button", name):
        japanese = "Japanese " if name.startswith("Japanese") else ""
        found = [f"{indefinite(f'{japanese}button')} that says {match[1]}"] if japanese or match[1].isupper() else []
    elif match := re.fullmatch(r"(person|man|woman|people|men|women) (\w+ing\b.*)", name):
        verb = "are" if match[1] in {"people", "men", "women"} else "is"
        subject = match[1] if verb == "are" else f"a {match[1]}"
        found = [f"{subject} who {verb} {match[2]}"]
    elif match := re.fullmatch(r"(\w+) face", name):
        animal = group == "Animals and nature"
        found = [f"the face of {indefinite(match[1])}", f"the head of {indefinite(match[1])}"] if animal else [
            f"a face that looks {match[1]}"]  # fmt: skip
    elif match := re.fullmatch(r"(no) (\w+)", name):
        found = [f"a no {match[2]} sign", f"{match[2]} forbidden"]
    elif group == "Symbols" and re.fullmatch(r"[A-Z][a-z]+", name):
        found = [f"the zodiac sign {name}", f"the sign of {name}"]
    return found


def natural(row: Mapping[str, Any], colour: str | None) -> list[str]:
    """Phrases for one emoji without its keywords, the plainest first."""
    name, group = plain(row["name"]), row["group"]
    one, thing = noun(name, group), thing_of(name, group)
    whole = reworded(name, group)
    found = [*([] if whole and (":" in name or TIMES.search(name)) else [thing]), *EXTRA.get(name, ()), *whole]
    face = bool(FACES.search(name))
    tinted = colour is not None and not (COLOURS | {"gray"}) & set(re.findall(r"[a-z]+", f"{one} {name}"))
    if one is not None and tinted and group not in {"People", "Flags"}:
        found.append(indefinite(f"{colour} {one}"))
    if face and group == "Smileys and emotions":
        moods = [w for w in (plain(k).lower() for k in row["keywords"]) if w in SYNONYM_ADJECTIVES]
        for mood in (w for w in moods if w not in name.split()):
            found.append(indefinite(f"{mood} face"))
            if tinted:
                found.append(indefinite(f"{mood} {colour} face"))
        if tinted and one is not None and name.split()[0] in SYNONYM_ADJECTIVES:
            first, rest = one.split(" ", 1)
            found.append(indefinite(f"{first} {colour} {rest}"))
    return found


def keyword_phrases(row: Mapping[str, Any], owners: Mapping[str, set[str]]) -> tuple[list[str], list[str], list[str]]:
    """(phrases made of keywords alone, phrases of name and keyword, keywords that are too common)."""
    name = plain(row["name"])
    in_name = {name.lower(), *re.split(r"[ ,:]+", name.lower())}
    in_name |= {f"{w}s" for w in in_name}
    words = dict.fromkeys(plain(k).lower() for k in row["keywords"] if k not in UNSEEN)
    weak = [w for w in words if len(owners.get(w, ())) >= WEAK_FROM]
    told = [w for w in words if w not in in_name and len(w) > 2 and any(c.isalpha() for c in w)]
    told.sort(key=lambda w: len(owners.get(w, ())))  # the rarest tell most; ties keep their order
    only = {row["name"]}
    alone = [w for w in told if owners.get(w) == only][:3]
    pairs = [(a, b) for i, a in enumerate(told) for b in told[i + 1 :] if a not in weak or b not in weak]
    told_apart = [f"{a}, {b}" for a, b in pairs if owners.get(a, set()) & owners.get(b, set()) == only][:4]
    alone_phrases = [*alone, *(f"{w} emoji" for w in alone), *told_apart]
    return alone_phrases, [f"{name}, {w}" for w in told if w not in weak][:4], weak


# ---------------------------------------------------------------- captions


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[^\s,:]+", text.lower()))


def phrase_all(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str | None]) -> dict[str, Phrased]:
    """Captions of every emoji by its name. `colours` gives the measured colour word by name."""
    owners = keyword_owners(dict(row) for row in rows)
    candidates: dict[str, tuple[list[str], list[str], list[str]]] = {}
    weak: dict[str, list[str]] = {}
    for row in rows:
        name = plain(row["name"])
        said = list(dict.fromkeys(natural(row, colours.get(row["name"]))))
        carried = [form.format(said[0]) for form in rotated(CARRIERS, name)[:5]]
        carried += [rotated(CARRIERS, phrase)[0].format(phrase) for phrase in said[1:]]
        keyed, mixed, weak[row["name"]] = keyword_phrases(row, owners)
        candidates[row["name"]] = ([name.lower(), *said, f"{name} emoji"], carried + mixed, keyed)
    given = Counter(text.lower() for parts in candidates.values() for text in {t.lower() for p in parts for t in p})
    phrased = {}
    for row in rows:
        plain_ones, others, keyed = ([t for t in part if given[t.lower()] == 1] for part in candidates[row["name"]])
        first = plain(row["name"]).lower()
        result = split_off(row["name"], list(dict.fromkeys([first, *plain_ones])), others, keyed)
        result.weak = weak[row["name"]]
        phrased[row["name"]] = result
    return phrased


def rotated(forms: Sequence[str], key: str) -> list[str]:
    start = pick(key, len(forms))
    return [*forms[start:], *forms[:start]]


def split_off(name: str, kept: list[str], others: list[str], keyed: list[str]) -> Phrased:
    """Hold out one phrasing of keywords and one other, where what remains still has all their words."""
    held: list[str] = []
    everything = list(dict.fromkeys([*kept, *others, *keyed]))
    for pool in (keyed, others):
        for text in rotated(pool, name) if pool else []:
            rest = set().union(*(words_of(other) for other in everything if other not in [*held, text]))
            if words_of(text) <= rest:
                held.append(text)
                break
    once = {text.lower(): text for text in reversed(everything)}  # "leo" and "Leo" are one
    left = [text for text in everything if text not in held and once[text.lower()] == text]
    if len(left) > MAX_CAPTIONS:
        # Those that carry a held-out phrasing's words must stay.
        needed = set().union(set(), *(words_of(text) for text in held))
        spare = [text for text in left[2:] if not needed & words_of(text)][::-1]
        dropped = set(spare[: len(left) - MAX_CAPTIONS])
        left = [text for text in left if text not in dropped]
    return Phrased(left, held)


def count_phrase(one: str, count: int) -> str:
    """ "a red apple", "two red apples", "three slices of pizza"."""
    return indefinite(one) if count == 1 else f"{('two', 'three')[count - 2]} {plural(one)}"
