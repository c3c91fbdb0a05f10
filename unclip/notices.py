"""This project's own warnings as one line each, told apart from those of libraries; those of captions that are cut."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("unclip", "prior", "decoder", "upsamplers")
_ROOT = Path(__file__).parents[1]
_QUOTED = 100  # letters of a caption


def in_lines(command: str, otherwise: Callable[..., None]) -> Callable[..., None]:
    """For `warnings.showwarning`: "COMMAND: warning: …" on stderr, each text once; a library's goes to `otherwise`."""
    seen: set[str] = set()

    def show(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if not issubclass(category, UserWarning) or not _is_own(filename):
            otherwise(message, category, filename, *rest, **named)
            return
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            print(f"{command}: warning: {text}", file=sys.stderr)

    return show


class CaptionCut(UserWarning):
    """A caption was longer than a text encoder reads."""


class CutNotices:
    """Warnings of captions that are cut: of every prompt, or with `first_only` of the first of a data set, which may
    have millions."""

    def __init__(self) -> None:
        self.first_only = False
        self._given = False

    @property
    def over(self) -> bool:
        """Whether nothing more is said, so that nobody need find out what was dropped."""
        return self.first_only and self._given

    def give(self, dropped: str, whose: str, length: int) -> None:
        """Warn of one caption that lost the words `dropped`; `whose` length it is: "CLIP's"."""
        if self.over:
            return
        self._given = True
        dropped = dropped if len(dropped) <= _QUOTED else f"{dropped[:_QUOTED].rstrip()}…"
        if self.first_only:
            text = f"captions longer than {whose} {length} tokens are cut; the first of them lost {dropped!r}"
        else:
            text = f"the prompt is longer than {whose} {length} tokens and was cut; dropped: {dropped!r}"
        warnings.warn(text, CaptionCut, stacklevel=3)


def _is_own(filename: str) -> bool:
    file = Path(filename)
    return file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in _PACKAGES
