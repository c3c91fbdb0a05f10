"""Errors a user can cause. Each message says what came, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

TOLD = 8  # names of files in a message


class UnclipError(Exception):
    """A failure that the user can understand and mend; the command ends with exit code 1."""

    exit_code = 1


class UsageError(UnclipError):
    """Wrong usage: an argument or option that cannot be meant; the command ends with exit code 2."""

    exit_code = 2


def contents(folder: Path) -> str:
    """What an error adds about a folder that lacks something: the names in it, the first of many, or of a run's folder
    where its model is.
    """
    if not folder.is_dir():
        return "no such folder"
    if (folder / "model").is_dir() and (folder / "config.yaml").is_file():
        return f"a run, whose model is {folder / 'model'}"
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return f"{', '.join(names[:TOLD]) or 'nothing'}{more}"


def nearest(pattern: str, names: Iterable[str]) -> str:
    """What an error adds about a dotted name or pattern that is not there: those most like it, or the first few."""
    known = list(dict.fromkeys(names))
    parents = [".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)]
    every = list(dict.fromkeys([*parents, *known]))
    close = difflib.get_close_matches(pattern.rstrip("*."), every, n=3, cutoff=0.6)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"there are {', '.join(known[:3])}{f', … ({len(known)} in all)' if len(known) > 3 else ''}"
