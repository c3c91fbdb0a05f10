"""Work that several processes share and that goes on where it was killed: arrays in pieces, a file each.

A piece is the same however many processes there are. Each is written under a temporary name and renamed when whole, and
processes share nothing but the folder; whoever finds all pieces there makes what follows from them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclip.bundle import read_json, write_json
from unclip.config import DataConfig
from unclip.data.fingerprint import changed_since, fingerprint
from unclip.errors import UnclipError

MANIFEST = "settings.json"
FORMAT = 1


@dataclass(frozen=True)
class Share:
    """Which process this is, of how many."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Share:
        """As torchrun or deepspeed say in the environment."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def owns(self, number: int) -> bool:
        return number % self.world_size == self.rank


class Pieces:
    """The pieces of one kind in a folder: `<kind>-<number>.npz`, and the names of what they hold."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def file(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number:05d}.npz"

    def has(self, number: int) -> bool:
        return self.file(number).is_file()

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """UnclipError: it cannot be written."""
        temporary = self.folder / f".tmp-{uuid.uuid4().hex[:8]}-{self.kind}.npz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as stream:
                    np.savez(stream, **arrays)  # type: ignore[arg-type]
                temporary.replace(self.file(number))
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UnclipError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    def complete(self, count: int) -> bool:
        """Whether pieces 0 … count − 1 are there."""
        return all(self.has(number) for number in range(count))

    def load(self, count: int) -> dict[str, np.ndarray]:
        """All pieces end to end, by the arrays' names. UnclipError: one is missing or damaged."""
        parts: dict[str, list[np.ndarray]] = {}
        for number in range(count):
            try:
                with np.load(self.file(number), allow_pickle=False) as stored:
                    for name in stored.files:
                        parts.setdefault(name, []).append(stored[name])
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise UnclipError(f"{self.file(number)} is damaged; remove it and enter the same line again") from error
            except Exception as error:  # a damaged archive can raise nearly anything
                raise UnclipError(f"{self.file(number)} is damaged; remove it and enter the same line again") from error
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def begin(folder: Path, settings: Mapping[str, Any], data: DataConfig, cache: Path) -> None:
    """Write what a folder of results is made with, or compare it with what it was begun with. `data` gives the
    captions; it may hold the folder itself, and `cache`.

    Raises UnclipError: the folder holds something else, was begun with other settings or with data that were changed
    since, or cannot be written.
    """
    own = (folder, cache)
    state = {"fingerprint": fingerprint(data, own)}
    wanted = json.loads(json.dumps({"format": FORMAT, **settings}))
    try:
        if (folder / MANIFEST).is_file():
            before = read_json(folder / MANIFEST)
            _compare(folder, before, wanted | state, data, own)
            if "fingerprint" not in before:
                write_json(folder / MANIFEST, before | state)
            return
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".tmp-")] if folder.is_dir() else []
        if [name for name in others if name != MANIFEST]:
            raise UnclipError(f"{folder} holds something else; name a folder that is new or empty")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, wanted | state)
    except OSError as error:
        raise UnclipError(f"cannot write to {folder}: {error.strerror or error}") from error


def _compare(
    folder: Path, before: dict[str, Any], wanted: dict[str, Any], data: DataConfig, own: tuple[Path, ...]
) -> None:
    changed = [name for name in sorted({*before, *wanted}) if before.get(name) != wanted.get(name)]
    of_data = "fingerprint" in changed and "prompts" not in changed
    # A folder of an earlier version says nothing of the data's files; its settings were written when it was begun.
    if of_data and ("fingerprint" in before or changed_since(data, folder / MANIFEST, own)):
        raise UnclipError(
            f"files of {data.source!r} were added, changed or removed since {folder} was begun; name another folder, "
            "or remove this one"
        )
    changed = [name for name in changed if name != "fingerprint"]
    if changed:
        old, new = _differing(before.get(changed[0]), wanted.get(changed[0]))
        raise UnclipError(
            f"{folder} was begun with {changed[0]} {_short(old)}, now it is {_short(new)}; name another folder, or say "
            "the same as then"
        )


def _differing(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two dictionaries what is not the same in both."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: old.get(name) for name in names}, {name: new.get(name) for name in names}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 100 else f"{text[:97]}…"
