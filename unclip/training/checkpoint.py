"""Resumable run state on disk: written whole or not at all, rotated, and checked before it is read.

A checkpoint is a folder `step-N` with a file a process (unclip.training.state) and `manifest.json`, which holds every
file's size and SHA-256. It is written under a temporary name that is changed when everything is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unclip.errors import UnclipError
from unclip.training.distributed import Distributed, told_once

_PREFIX = "step-"
_MANIFEST = "manifest.json"
_FORMAT = 1


def save_checkpoint(
    folder: Path, step: int, body: dict[str, Any], distributed: Distributed, *, keep: int, keep_every: int = 0
) -> Path:
    """Write `folder/step-N` with every process's `body` and drop older ones, but for the newest `keep` and those whose
    step is a multiple of `keep_every`. All processes must call this together.

    Raises UnclipError on all of them when one cannot write; older checkpoints then stay as they are.
    """
    temporary, final = folder / f".tmp-{_PREFIX}{step:08d}", folder / f"{_PREFIX}{step:08d}"
    found = checkpoints(folder)
    stays = f"{found[-1]} stays" if found else "there is none before it"
    failure = (
        f"the checkpoint of step {step} in {folder} cannot be written: {{}}; {stays}. Mend that and enter the same "
        "line again"
    )

    def begin() -> None:
        if distributed.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def finish() -> None:
        if distributed.is_main:
            _check_sizes(temporary, files)
            manifest = {"format": _FORMAT, "step": step, "world_size": distributed.world_size, "files": files}
            _write(temporary / _MANIFEST, lambda out: out.write(json.dumps(manifest, indent=1).encode()))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(folder)

    try:
        distributed.together(begin, failure)
        name = f"rank-{distributed.rank}.pt"
        written = distributed.together(lambda: _write(temporary / name, lambda out: torch.save(body, out)), failure)
        files = {f"rank-{rank}.pt": described for rank, described in enumerate(written)}
        distributed.together(finish, failure)
    except UnclipError:
        if distributed.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if distributed.is_main:
        for old in checkpoints(folder)[:-keep]:
            if not keep_every or int(old.name.removeprefix(_PREFIX)) % keep_every:
                shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(folder: Path, distributed: Distributed, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written, or None where there is none at all; the processes share out the
    reading, and agree. A damaged one is named and passed over.

    Raises UnclipError: all of them are damaged.
    """
    if distributed.is_main and folder.is_dir():
        for leftover in folder.glob(".tmp-*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
    found = distributed.gather(checkpoints(folder))[0]
    problems = []
    for path in reversed(found):
        answers = distributed.gather(_problem(path, distributed))
        problem = next((answer for answer in answers if answer is not None), None)
        if problem is None:
            return Path(path)
        problems.append(f"{path.name}: {problem}")
        say(f"the checkpoint {path} is damaged ({problem}) and is not used")
    if problems:
        message = f"no checkpoint in {folder} can be read ({'; '.join(problems)}); move the folder away to begin anew"
        raise told_once(UnclipError(message), distributed)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def files_of(checkpoint: Path) -> list[Path]:
    """The processes' files, in the order of ranks."""
    world_size = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))["world_size"]
    return [checkpoint / f"rank-{rank}.pt" for rank in range(world_size)]


def _problem(path: Path, distributed: Distributed) -> str | None:
    """What is wrong with this process's share of the files."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"its format is {manifest['format']}, and {_FORMAT} is the one that is known"
        files = manifest["files"]
        if len(files) != manifest["world_size"]:
            return f"{_MANIFEST} names {len(files)} files of {manifest['world_size']} processes"
        for name in sorted(files)[distributed.rank :: distributed.world_size]:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, {files[name]['bytes']} were written"
            if _digest(path / name) != files[name]["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be understood"
    return None


class _Hashing:
    """A file that is open for writing and knows the digest of what went into it."""

    def __init__(self, out: Any) -> None:
        self.out, self.digest, self.bytes = out, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.out.write(data)
        except OSError as error:  # which torch would turn into a RuntimeError about its archive
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.out.flush()


def _write(file: Path, fill: Callable[[Any], Any]) -> dict[str, Any]:
    """Write and sync a file -> its entry in the manifest. OSError: it cannot be."""
    with file.open("wb", buffering=1 << 20) as out:
        hashing = _Hashing(out)
        try:
            fill(hashing)
            out.flush()
            os.fsync(out.fileno())
        except RuntimeError:
            if hashing.error is not None:
                raise hashing.error from None
            raise
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


def _check_sizes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, described in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != described["bytes"]:
            raise OSError(f"{name}, written by another process, is not there; all nodes must share the run folder")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
