"""The emoji example's captions: English that is right, phrasings that fit one emoji, and some held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_emoji import make_source, scripts
from PIL import Image


@pytest.fixture(scope="module")
def emoji() -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    with scripts():
        import nouns
        import phrasings
        import prepare

        yield SimpleNamespace(nouns=nouns, phrasings=phrasings, prepare=prepare)


@pytest.fixture(scope="module")
def lines(emoji: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """metadata.jsonl of the tiny set with natural captions, by name."""
    folder = tmp_path_factory.mktemp("captions")
    source = make_source(folder / "source")
    arguments = ["--source", str(source), "--out", str(folder / "out"), "--size", "32", "--workers", "1"]
    assert emoji.prepare.main([*arguments, "--captions", "natural"]) == 0
    text = (folder / "out" / "metadata.jsonl").read_text(encoding="utf-8")
    return {row["name"]: row for row in map(json.loads, text.splitlines())}


@pytest.mark.parametrize(
    ("one", "many"),
    [("red apple", "red apples"), ("slice of pizza", "slices of pizza"), ("box of fries", "boxes of fries"),
     ("snowman", "snowmen"), ("cherry", "cherries"), ("key", "keys"), ("wolf", "wolves"), ("fish", "fish"),
     ("pair of glasses", "pairs of glasses"), ("red car seen from the front", "red cars seen from the front"),
     ("sheaf of rice", "sheaves of rice"), ("bus", "buses"), ("T-Rex", "T-Rexes"), ("human", "humans")],
)  # fmt: skip
def test_plurals(emoji: SimpleNamespace, one: str, many: str) -> None:
    assert emoji.nouns.plural(one) == many
    assert emoji.phrasings.count_phrase(one, 2) == f"two {many}"
    assert emoji.phrasings.count_phrase(one, 3) == f"three {many}"


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("owl", "an"), ("unicorn", "a"), ("hourglass", "an"), ("one-piece swimsuit", "a"), ("uninvited guest", "an"),
     ("x-ray", "an"), ("SOS button", "an"), ("Mx Claus", "a"), ("red apple", "a"), ("orange book", "an")],
)  # fmt: skip
def test_articles(emoji: SimpleNamespace, phrase: str, article: str) -> None:
    assert emoji.nouns.indefinite(phrase) == f"{article} {phrase}"


@pytest.mark.parametrize(
    ("name", "group", "phrase"),
    [("man: red hair", "People", "a red-haired man"), ("keycap: 5", "Symbols", "the number 5 on a key"),
     ("two o’clock", "Objects", "a clock showing two o'clock"), ("woman running", "People", "a woman who is running"),
     ("family: man, woman, boy", "Other", "a family of a man, a woman and a boy"),
     ("men wrestling", "People", "men who are wrestling"), ("Leo", "Symbols", "the zodiac sign Leo"),
     ("man walking: facing right", "People", "a man walking facing right"),
     ("no smoking", "Symbols", "a no smoking sign"),
     ("dog face", "Animals and nature", "the head of a dog"), ("COOL button", "Symbols", "a button that says COOL")],
)  # fmt: skip
def test_names_that_follow_a_pattern_become_phrases(
    emoji: SimpleNamespace, name: str, group: str, phrase: str
) -> None:
    assert phrase in emoji.phrasings.reworded(name, group)


@pytest.mark.parametrize(
    ("colours", "word"),
    [([(220, 30, 30)], "red"), ([(255, 215, 0)], "yellow"), ([(20, 100, 230)], "blue"), ([(120, 70, 20)], "brown"),
     ([(250, 250, 250)], "white"), ([(128, 128, 128)], "grey"), ([(10, 10, 12)], "black"), ([(30, 160, 60)], "green"),
     ([(255, 140, 0)], "orange"), ([(140, 60, 200)], "purple"), ([(250, 120, 190)], "pink"),
     ([(252, 194, 27)], "yellow"), ([(219, 164, 99)], "brown"), ([(255, 232, 201)], "beige"),
     ([(255, 165, 170)], "pink"), ([(142, 47, 151)], "purple"),
     ([(120, 144, 156)], "grey"), ([(220, 30, 30), (250, 250, 250)], "red and white"),
     ([(220, 30, 30), (20, 100, 230), (30, 160, 60), (250, 250, 250)], None)],
)  # fmt: skip
def test_colour_words_are_measured(
    emoji: SimpleNamespace, colours: list[tuple[int, int, int]], word: str | None
) -> None:
    drawn = Image.new("RGBA", (12, 12), (255, 0, 255, 0))  # transparency has no colour
    for number, colour in enumerate(colours):
        drawn.paste((*colour, 255), (number * 3, 0, number * 3 + 3, 12))
    found = emoji.phrasings.colour_word(drawn)
    assert found == word or (word == "red and white" and found == "white and red")
    assert emoji.phrasings.colour_word(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) is None


def test_captions_are_natural_and_fit_one_emoji_only(lines: dict[str, dict]) -> None:
    assert lines["owl"]["captions"][:3] == ["owl", "an owl", "a brown owl"]
    assert "a blue car" in lines["sport utility vehicle"]["captions"]
    assert {"a mad face", "a mad red face", "an enraged red face"} <= set(
        lines["enraged face"]["captions"] + lines["enraged face"]["held_out"]
    )
    assert "a bunch of grapes" in lines["grapes"]["captions"]
    everything = Counter(text.lower() for row in lines.values() for text in row["captions"] + row["held_out"])
    assert [text for text, times in everything.items() if times > 1] == []
    assert not any("red red" in text for text in everything)
    for row in lines.values():
        assert row["caption"] == row["captions"][0] and len(row["captions"]) >= 5


def test_a_keyword_of_many_emoji_is_given_to_none_alone(emoji: SimpleNamespace, lines: dict[str, dict]) -> None:
    # "fruit" belongs to four: alone it would fit all of them.
    assert not any("fruit" in row["captions"] + row["held_out"] for row in lines.values())
    rows = [{"name": f"thing {i}", "keywords": ["shared", f"own{i}"], "group": "Objects"} for i in range(5)]
    phrased = emoji.phrasings.phrase_all(rows, {})
    assert phrased["thing 0"].weak == ["shared"]
    assert not any("shared" in text for text in phrased["thing 0"].captions if "own0" not in text)


def test_held_out_phrasings_are_not_trained_on_and_their_words_are(
    emoji: SimpleNamespace, lines: dict[str, dict]
) -> None:
    assert sum(len(row["held_out"]) for row in lines.values()) >= len(lines)
    for row in lines.values():
        known = set().union(*(emoji.phrasings.words_of(text) for text in row["captions"]))
        for text in row["held_out"]:
            assert text not in row["captions"]
            assert emoji.phrasings.words_of(text) <= known, text


def test_captions_are_the_same_every_time(emoji: SimpleNamespace, lines: dict[str, dict], tmp_path: Path) -> None:
    again = emoji.prepare.collect(make_source(tmp_path / "s"), None, True)
    assert {e.meta["name"]: e.meta["captions"] for e in again} == {n: row["captions"] for n, row in lines.items()}


def test_no_caption_comes_twice_in_another_case_and_times_are_no_things(emoji: SimpleNamespace) -> None:
    rows = [{"name": "Leo", "keywords": ["lion"], "group": "Symbols"},
            {"name": "two o’clock", "keywords": ["o’clock"], "group": "Objects"},
            {"name": "white flag", "keywords": ["waving"], "group": "Flags"}]  # fmt: skip
    phrased = emoji.phrasings.phrase_all(rows, {})
    for found in phrased.values():
        lower = [text.lower() for text in found.captions + found.held_out]
        assert len(set(lower)) == len(lower)
    assert not any("a two" in text for text in phrased["two o’clock"].captions)
    assert "a white flag" in phrased["white flag"].captions


def test_names_stay_the_default(emoji: SimpleNamespace, tmp_path: Path) -> None:
    meta = emoji.prepare.collect(make_source(tmp_path / "s"), None)[0].meta
    assert "held_out" not in meta and meta["captions"][:3] == ["red apple", "a red apple", "a picture of a red apple"]
