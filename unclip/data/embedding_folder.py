"""A folder of embeddings while `unclip embed --dataset` writes it: what it was begun with, and when it is whole."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from unclip.bundle import write_json
from unclip.config import DataConfig
from unclip.data.embeddings import MANIFEST, read_manifest
from unclip.data.fingerprint import changed_since
from unclip.errors import UnclipError

_NULL = "null.npz"


def begin(
    folder: Path, settings: dict[str, Any], config: DataConfig, null: Callable[[], dict[str, np.ndarray]]
) -> list[Path]:
    """Write what is known before the work, or check it against what the folder was begun with. Returns the folders that
    are this run's own, innermost first.

    Raises UnclipError: the folder holds something else, was begun with something else, cannot be written.
    """
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if (folder / MANIFEST).is_file():
            before = read_manifest(folder)
            made = [folder]
            if not (before.get("complete") and before.get("rows") == 0):
                _compare(folder, before, settings, config)
                return made
            discard(folder, [])  # earlier versions left it behind where no sample could be used
        others = (_NULL, MANIFEST)  # of a process that begins at the same time
        found = folder.iterdir() if folder.is_dir() else ()
        if any(path for path in found if not path.name.startswith(".tmp-") and path.name not in others):
            raise UnclipError(f"{folder} holds something else than embeddings; name a folder that is new or empty")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{uuid.uuid4().hex[:8]}-{_NULL}"
        with temporary.open("wb") as out:
            np.savez(out, **null())  # type: ignore[arg-type]
        temporary.replace(folder / _NULL)
        write_json(folder / MANIFEST, {**settings, "complete": False})
    except OSError as error:
        raise UnclipError(f"cannot write to {folder}: {error.strerror or error}") from error
    return made


def _compare(folder: Path, before: dict[str, Any], settings: dict[str, Any], config: DataConfig) -> None:
    """UnclipError: the folder was begun with something else. Where an earlier version began it, which noted nothing of
    the data's state, no file of the data may be younger than that; the state is noted then.
    """
    noted = "fingerprint" in before
    if not noted and not changed_since(config, folder / _NULL, [folder]):
        before = {**before, "fingerprint": settings["fingerprint"]}
    for name, value in settings.items():
        if before.get(name) == value:
            continue
        if name == "fingerprint":
            what = "files were added, changed or removed"
            if config.source == "synthetic":
                what = "data.synthetic is another"
            raise UnclipError(
                f"the data set {config.source!r} is not what it was when {folder} was begun ({what}); remove that "
                "folder to embed all of it anew, or name another --out"
            )
        raise UnclipError(
            f"{folder} was begun with {name} {_short(before.get(name))}, now it is {_short(value)}; name another "
            "folder, or say the same as then"
        )
    if not noted:
        write_json(folder / MANIFEST, before)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else f"{text[:117]}…"


def described(piece: Path) -> dict[str, Any] | None:
    """shard.json of a piece that was written whole."""
    try:
        body: dict[str, Any] = json.loads((piece / "shard.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return body


def complete(folder: Path, shards: int) -> int | None:
    """Name all pieces in the manifest, if all are there: of several processes the last one finds them so. Returns the
    number of samples then, else None; where there is no sample, the manifest is left as it is.
    """
    pieces = []
    for shard in range(shards):
        for number in range(10**6):
            name = f"{shard:05d}-{number:05d}"
            piece = described(folder / name)
            if piece is None:
                return None
            if piece["rows"]:
                pieces.append({"name": name, "rows": piece["rows"], "captions": piece["captions"]})
            if piece["last"]:
                break
    rows, captions = (sum(piece[name] for piece in pieces) for name in ("rows", "captions"))
    if rows:
        body = {**read_manifest(folder), "complete": True, "rows": rows, "captions": captions, "shards": pieces}
        write_json(folder / MANIFEST, body)
    return rows


def discard(folder: Path, made: list[Path]) -> None:
    """Take away what was written to a folder in which there is no sample, and the folders `made` for it."""
    for piece in list(_pieces(folder)):
        shutil.rmtree(piece, ignore_errors=True)
    for name in (MANIFEST, _NULL):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # another process is at work there, or somebody has put something into it
        for path in made:
            path.rmdir()


def skipped(folder: Path) -> str:
    """Why there is no sample in a piece, as the process that wrote it has noted; empty where none has."""
    noted = ((described(piece) or {}).get("skipped") for piece in _pieces(folder))
    return next((str(one) for one in noted if one), "")


def _pieces(folder: Path) -> Iterator[Path]:
    """Those that were written whole."""
    return (file.parent for file in sorted(folder.glob("[0-9]*-[0-9]*/shard.json")))
