"""Sheets of two models side by side, and the votes counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclip.errors import UnclipError, UsageError
from unclip.evaluation.bootstrap import crossed_interval, wilson
from unclip.evaluation.pairs import Side, check, count, make, read_key, report, side_by_side, sides

Run = Callable[..., tuple[int, str, str]]


class Plain:
    """In the place of a model: pictures of one colour, which the seed shades."""

    def __init__(self, colour: tuple[int, int, int]) -> None:
        self.colour = colour

    def sample(self, prompts: list[str], *, seed: list[int], size: int, **_: Any) -> list[Image.Image]:
        return [Image.new("RGB", (size, size), (*self.colour[:2], one)) for one in seed]


RED, GREEN = Plain((200, 0, 0)), Plain((0, 200, 0))


def made(folder: Path, prompts: int = 7, seed: int = 3) -> dict[str, Any]:
    first, second = Side("madder", RED, {"guidance": 3.0}), Side("verdigris", GREEN, {})  # type: ignore[arg-type]
    texts = [f"prompt {index}" for index in range(prompts)]
    make(first, second, texts, folder / "sheets", folder / "key.json", size=64, seed=seed, batch_size=3)
    return read_key(folder / "key.json")


def test_sides_are_drawn_and_balanced() -> None:
    assert [sum(sides(count, 5)) for count in (8, 9)] == [4, 5]
    assert sides(40, 1) == sides(40, 1) != sides(40, 2)
    runs = np.mean([sides(9, seed) for seed in range(400)], axis=0)
    assert np.all(abs(runs - 5 / 9) < 0.12)  # every place alike


def test_sheets_tell_nothing_and_the_key_all(tmp_path: Path) -> None:
    key = made(tmp_path)
    for one in key["pairs"]:
        sheet = Image.open(tmp_path / "sheets" / f"{one['pair']}.png")
        left = np.asarray(sheet.convert("RGB"))[sheet.height // 2, sheet.width // 4]
        assert (left[0] > left[1]) == (one["left"] == "a") and left[2] == one["seed"]
        assert not sheet.info or not {"model", "key", "left"} & set(sheet.info)
    assert {one["left"] for one in key["pairs"]} == {"a", "b"}
    shown = {file.name for file in (tmp_path / "sheets").iterdir()}
    assert shown == {"votes.csv", "how-to-vote.txt", *(f"pair-{i:04d}.png" for i in range(1, 8))}
    texts = "".join(file.read_text() for file in (tmp_path / "sheets").glob("*.[ct]*"))
    assert not any(word in texts for word in ("madder", "verdigris", "guidance"))
    for place, words in ((tmp_path / "key.json", "votes may be waiting"), (tmp_path / "new" / "k.json", "among the")):
        with pytest.raises(UnclipError, match=words):
            check(tmp_path / "new", place)
    with pytest.raises(UnclipError, match="is there already"):
        check(tmp_path / "sheets", tmp_path / "other.json")


def vote(file: Path, votes: dict[str, str], separator: str = ",") -> Path:
    lines = [separator.join(("pair", "prompt", "vote"))]
    lines += [separator.join((pair, '"a, b"', answer)) for pair, answer in votes.items()]
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    return file


def test_votes_are_turned_back_to_models(tmp_path: Path) -> None:
    key = made(tmp_path)
    for_a = {one["pair"]: "left" if one["left"] == "a" else "right" for one in key["pairs"]}
    names = list(for_a)
    mixed = dict(for_a) | {names[0]: "tie", names[1]: "left" if for_a[names[1]] == "right" else "Right ", names[2]: ""}
    first, second = vote(tmp_path / "1.csv", for_a), vote(tmp_path / "2.csv", mixed, ";")
    alone = count(key, [first])
    assert (alone.wins, alone.losses, alone.ties) == (7, 0, 0) and alone.chance == pytest.approx(2 / 2**7)
    both = count(key, [first, second])
    assert (both.wins, both.losses, both.ties) == (7 + 4, 1, 1)
    assert both.by_prompt == (0.75, 0.5, 1, 1, 1, 1, 1) and both.share.value == pytest.approx(11.5 / 13)
    assert both.chance == pytest.approx(2 / 2**6)  # one pair is even
    assert both.share_by_prompt.value == pytest.approx(6.25 / 7)
    assert both.several and not alone.several and alone.share == wilson(7, 7)
    assert vars(both.share) == vars(crossed_interval(both.by_voter)) and both.by_voter.shape == (2, 7)
    assert not count(key, [first, vote(tmp_path / "empty.csv", dict.fromkeys(names, ""))]).several
    assert "bootstrap over voters and pairs" in report(key, both, 2).markdown()
    assert "madder (A) is preferred" in report(key, alone, 1).markdown()
    assert "do not tell" in report(key, count(key, [vote(tmp_path / "3.csv", {names[0]: "left"})]), 1).markdown()


def test_intervals_of_several_voters_hold_the_truth() -> None:
    """Votes with an effect of the pair and one of the voter: intervals of independent votes hold it far too seldom."""
    rng = np.random.default_rng(0)
    spread = np.hypot(1.5, 0.5)
    truth = float((1 / (1 + np.exp(-(0.5 + spread * rng.standard_normal(200_000))))).mean())
    tries, held = 200, {"crossed": 0, "independent": 0}
    for _ in range(tries):
        logit = 0.5 + 1.5 * rng.standard_normal((1, 40)) + 0.5 * rng.standard_normal((5, 1))
        votes = (rng.random((5, 40)) < 1 / (1 + np.exp(-logit))).astype(float)
        found, plain = crossed_interval(votes, resamples=400), wilson(votes.sum(), votes.size)
        assert found.value == pytest.approx(votes.mean()) and found.low < found.value < found.high
        held["crossed"] += found.low <= truth <= found.high
        held["independent"] += plain.low <= truth <= plain.high
    assert 0.9 <= held["crossed"] / tries <= 0.995
    assert held["independent"] / tries < 0.85


def test_crossed_intervals_of_what_is_known_alone() -> None:
    votes = np.array([[1.0, 0.0, np.nan, 0.5], [np.nan, np.nan, 1.0, np.nan]])
    assert crossed_interval(votes).value == pytest.approx(2.5 / 4)
    alike = crossed_interval(np.ones((3, 10)))  # thirty votes say no more than ten pairs
    assert vars(alike) == vars(wilson(10, 10))
    for nothing in (np.full((2, 2), np.nan), np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(UsageError, match="have no mean to resample"):
            crossed_interval(nothing)


def test_wrong_tables_are_answered(tmp_path: Path) -> None:
    key = made(tmp_path, 2)
    for body, words in (
        ("pair,vote\npair-0009,left\n", "line 2: the key has no pair 'pair-0009'"),
        ("pair,vote\npair-0001,both\n", "the vote is 'both'; expected left, right, tie"),
        ("pair,vote\npair-0001,left\npair-0001,tie\n", "line 3: pair-0001 has been voted on"),
        ("pair,choice\npair-0001,left\n", "no columns pair and vote"),
        ("pair,vote\npair-0001,\n", "no vote in"),
    ):
        (tmp_path / "v.csv").write_text(body)
        with pytest.raises(UsageError, match=words):
            count(key, [tmp_path / "v.csv"])
    with pytest.raises(UnclipError, match="no key at"):
        read_key(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UnclipError, match="no key of pairs"):
        read_key(tmp_path / "other.json")


def test_long_prompts_and_small_pictures_fit() -> None:
    small = side_by_side([Image.new("RGB", (64, 64), "red")] * 2, "a prompt " * 30)
    assert small.width == 2 * 256 + 48 and small.height > 256 + 5 * 16
    assert np.asarray(small)[small.height // 2, small.width // 4].tolist() == [255, 0, 0]


def test_pairs_and_tally_commands(tmp_path: Path, tiny_bundle: Path, run_cli: Run) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    steps = ("--set-a", "decoder_steps=1", "--set-a", "prior_steps=1", "--set-b", "decoder_steps=2")
    common = ("--a", tiny_bundle, "--prompts-file", prompts, "--size", 64)
    out = tmp_path / "sheets"
    code, shown, told = run_cli("pairs", *common, *steps, "--set-b", "prior_steps=1", "--out", out)
    assert code == 0, told
    assert shown.split() == [str(out / "votes.csv"), str(tmp_path / "sheets-key.json")]
    key = read_key(tmp_path / "sheets-key.json")
    assert key["a"]["options"] == {"decoder_steps": 1, "prior_steps": 1}
    vote(out / "votes.csv", {one["pair"]: "left" for one in key["pairs"]})
    code, shown, told = run_cli("tally", out / "votes.csv", "--key", tmp_path / "sheets-key.json", "--json")
    assert code == 0 and json.loads(shown)["votes"] == {"a": 1, "b": 1, "ties": 0}, told
    for arguments, words in (
        ((*common, "--out", tmp_path / "x"), "same model with the same settings"),
        ((*common, "--set-b", "size=64", "--out", tmp_path / "x"), "'size=64' is not of the form"),
        ((*common, "--suite", "general", "--set-b", "guidance=2", "--out", tmp_path / "x"), "expected one of them"),
        ((*common, "--set-b", "guidance=-1", "--out", tmp_path / "x"), "guidance is -1"),
    ):
        code, _, told = run_cli("pairs", *arguments)
        assert code == 2 and words in told, told
    assert not (tmp_path / "x").exists()
