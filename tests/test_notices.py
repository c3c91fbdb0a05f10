"""Warnings as lines: this project's own ones, each once; a library's are handed on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import unclip
from unclip.notices import CaptionCut, CutNotices, in_lines

OWN = str(Path(unclip.__file__).with_name("clip.py"))


def test_own_warnings_are_one_line_each_and_others_are_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    handed: list[str] = []

    def otherwise(message: Any, *_: Any, **__: Any) -> None:
        handed.append(str(message))

    show = in_lines("train_prior.py", otherwise)
    for text, category, place in (
        ("the prompt\n  was cut", UserWarning, OWN),
        ("the prompt was cut", CaptionCut, OWN),
        ("something else", UserWarning, OWN),
        ("old", DeprecationWarning, OWN),
        ("theirs", UserWarning, warnings.__file__),
    ):
        show(category(text), category, place, 1)
    assert capsys.readouterr().err == (
        "train_prior.py: warning: the prompt was cut\ntrain_prior.py: warning: something else\n"
    )
    assert handed == ["old", "theirs"]


def test_of_a_data_set_the_first_caption_that_is_cut_is_told_and_of_prompts_each() -> None:
    cuts = CutNotices()
    with pytest.warns(CaptionCut) as told:
        cuts.give("red star", "CLIP's", 77)
        cuts.give("blue ring", "CLIP's", 77)
    assert [str(one.message).split("dropped: ")[1] for one in told] == ["'red star'", "'blue ring'"]
    with pytest.warns(CaptionCut) as told:
        cuts.give("x" * 100, "CLIP's", 77)
        cuts.give("red " * 10_000, "CLIP's", 77)
    assert [str(one.message).split("dropped: ")[1] for one in told] == [f"'{'x' * 100}'", f"'{('red ' * 25).strip()}…'"]
    cuts = CutNotices()
    cuts.first_only = True
    assert not cuts.over
    with pytest.warns(CaptionCut) as told:
        cuts.give("red star", "the text encoder's", 128)
        cuts.give("blue ring", "the text encoder's", 128)
    (one,) = told
    whose = "captions longer than the text encoder's 128 tokens are cut"
    assert str(one.message) == f"{whose}; the first of them lost 'red star'"
    assert cuts.over
