"""Run folders as they are seen from outside: who trains there, how far it is, and whether it still lives.

A run keeps `status.json`, written whole or not at all. While it trains, a thread of its first process renews it every
few seconds. A process that is killed cannot say so; it is missed: at once where this is the machine it ran on,
elsewhere (a shared file system) when its last sign of life has become old.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from unclip.errors import UnclipError

STATUS, METRICS, CONFIG, CHECKPOINTS = "status.json", "metrics.jsonl", "config.yaml", "checkpoints"
MEASURED = ("images_per_second", "mfu", "memory_gib")
"""Keys of a line of metrics that tell of the machine; all others are the same whenever a run is made again."""
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_TAIL = 1 << 16
_NOT_RUNS = {"checkpoints", "samples", "model", "wandb", "adapter", ".git"}

State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Run:
    """One run folder: what trains there and how far it is. Times are seconds since 1970."""

    path: str
    stage: str
    state: State
    reason: str
    step: int
    steps: int | None
    loss: float | None
    images_per_second: float | None
    started: float
    """When the run was begun first, however often it was continued."""
    updated: float
    """Its last sign of life."""
    bytes: int
    """What the folder takes on the disk."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class StatusFile:
    """The `status.json` of a run that trains in this process. Nothing here ever stops a training: what cannot be
    written is left."""

    def __init__(self, folder: Path, interval: float = HEARTBEAT_SECONDS, **facts: Any) -> None:
        self._file = folder / STATUS
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._written = 0.0  # on the monotonic clock
        before = _read_json(self._file)
        now = time.time()
        self._body: dict[str, Any] = {
            "state": "running",
            "reason": "",
            "started": before.get("started", now),
            "flops_per_image": before.get("flops_per_image"),
            "process": _this_process(),
            **facts,
        }
        self.write()
        self._thread = threading.Thread(target=self._beat, args=(interval,), name="heartbeat", daemon=True)
        self._thread.start()

    def __getitem__(self, name: str) -> Any:
        return self._body.get(name)

    def update(self, **facts: Any) -> None:
        """Remember; it is written at most once a second, and at the next heartbeat in any case."""
        with self._lock:
            self._body.update(facts)
        if time.monotonic() - self._written > 1:
            self.write()

    def close(self, state: State, reason: str = "") -> None:
        """Write how the run ended, and no more after that."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._body.update(state=state, reason=reason)
        self.write()

    def write(self) -> None:
        with self._lock, suppress(OSError):
            self._body["updated"], self._written = time.time(), time.monotonic()
            temporary = self._file.with_name(f".tmp-{STATUS}")
            temporary.write_text(json.dumps(self._body, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._file)

    def _beat(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.write()


def trainer_of(folder: Path, patience: float = 2.5 * HEARTBEAT_SECONDS) -> str | None:
    """Who trains in a run folder now, in words; None where that is nobody, or this process itself.

    A process that cannot be seen from here is one that renews its status within `patience` seconds. What was heard last
    does not tell: a run that was killed on one machine is soon started again on another.
    """
    status = _read_json(folder / STATUS)
    process = status.get("process") or {}
    if status.get("state") != "running" or process == _this_process():
        return None
    alive = _is_alive(process)
    if alive is None and time.time() - float(status.get("updated", 0)) <= STALE_SECONDS:
        alive = _is_renewed(folder / STATUS, status, patience)
    return f"process {process.get('pid')} on {process.get('host')}" if alive else None


def find_runs(folder: Path) -> list[Run]:
    """The runs in and below a folder, by path. UnclipError: no such folder."""
    if not folder.is_dir():
        raise UnclipError(f"there is no folder {folder}; name the one that holds your runs, such as runs")
    return [read_run(path) for path in sorted(_run_folders(folder))]


def read_run(folder: Path, now: float | None = None) -> Run:
    """What a run folder tells. One without `status.json`, of an older version, is told from its other files."""
    now = time.time() if now is None else now
    status = _read_json(folder / STATUS)
    last = last_row(folder / METRICS)
    config = {} if status else _read_config(folder)
    written = [_modified(folder / name) for name in (METRICS, CONFIG)]
    step = max(int(status.get("step", 0)), int(last.get("step", 0)))
    steps = status.get("steps", config.get("train", {}).get("steps") if config else None)
    if status:
        state, reason = _state_of(status, now)
    elif (folder / "model").is_dir() and steps is not None and step >= steps:
        state, reason = "finished", ""
    else:
        state, reason = "interrupted", "kept no status"
    return Run(
        path=str(folder),
        stage=str(status.get("stage") or _stage_of(config)),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        images_per_second=last.get("images_per_second"),
        started=float(status.get("started", min(filter(None, written), default=now))),
        updated=float(status.get("updated", max(written))),
        bytes=_size(folder),
    )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl` in their order; none where there is no file."""
    if not file.is_file():
        return []
    return _parse(file.read_text(encoding="utf-8", errors="replace"))


def last_row(file: Path) -> dict[str, Any]:
    """The newest value of everything that the end of a `metrics.jsonl` tells, however long the file is."""
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL))
        text = opened.read().decode("utf-8", errors="replace")
    merged: dict[str, Any] = {}
    for row in _parse(text):
        merged |= row
    return merged


def _parse(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut by a kill, or by where the tail begins
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _state_of(status: dict[str, Any], now: float) -> tuple[State, str]:
    state, reason = status.get("state", "interrupted"), str(status.get("reason", ""))
    if state != "running":
        return state, reason
    alive = _is_alive(status.get("process") or {})
    if alive is False:
        return "interrupted", "its process is gone"
    silent = now - float(status.get("updated", 0))
    if alive or silent <= STALE_SECONDS:
        return "running", f"silent for {silent:.0f} s" if silent > STALE_SECONDS else ""
    return "interrupted", f"no sign of life for {silent:.0f} s"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "born": _birth(pid), "host": platform.node(), "place": _place()}


def _is_alive(process: dict[str, Any]) -> bool | None:
    """Whether that process lives; None where it cannot be seen from here."""
    pid, place = process.get("pid"), _place()
    if place is None or process.get("place") != place or process.get("host") != platform.node() or not pid:
        return None
    born = _birth(pid)
    return born is not None and born == process.get("born")


def _is_renewed(file: Path, before: dict[str, Any], patience: float) -> bool:
    """Whether somebody writes a status while we wait."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(min(0.5, patience / 5))
        now = _read_json(file)
        if now and now.get("updated") != before.get("updated"):
            return now.get("state") == "running"
    return False


def _place() -> str | None:
    """What tells machines, boots and containers apart: within one place a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _birth(pid: int) -> int | None:
    """When a process started, in the kernel's ticks, which tells it from a later one of its number; None for none, and
    for one that is dead and not yet buried (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _run_folders(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        if STATUS in files or (CONFIG in files and (METRICS in files or CHECKPOINTS in folders)):
            yield Path(place)
        folders[:] = [name for name in folders if name not in _NOT_RUNS]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _read_config(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        body = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return body if isinstance(body, dict) else {}


def _stage_of(config: dict[str, Any]) -> str:
    """The stage whose keys a recorded configuration has."""
    model = config.get("model")
    if not isinstance(model, dict):
        return "?"
    for stage, key in (("clip", "vision"), ("upsampler", "low_size"), ("decoder", "unet"), ("prior", "width")):
        if key in model:
            return stage
    return "?"


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                found = (Path(place) / name).lstat()
                total += found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
    return total
