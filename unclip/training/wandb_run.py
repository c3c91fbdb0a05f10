"""Weights & Biases beside a training, which it never stops: whatever fails there costs one warning."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip.config import TrainConfig, WandbConfig
from unclip.errors import UsageError

IDENTITY = "wandb.json"
_MODES = {mode: mode for mode in ("online", "offline", "disabled", "shared")} | {"run": "online", "dryrun": "offline"}
"""What WANDB_MODE may say, and what it means here; the last two are older names."""


def mode_from(config: WandbConfig) -> str:
    """`mode`, where it is not auto, or what WANDB_MODE says; "auto" where neither says anything.

    Raises UsageError: a WANDB_MODE that does not exist.
    """
    said = os.environ.get("WANDB_MODE")
    if config.mode != "auto" or not said:
        return config.mode
    if said not in _MODES:
        raise UsageError(
            f"the environment variable WANDB_MODE is {said!r}; expected online, offline or disabled, or set "
            "train.wandb.mode, which goes before it"
        )
    return _MODES[said]


class WandbRun:
    """A run at Weights & Biases, online or in files of its own below the run folder (offline).

    Its id stands in `wandb.json`, so that a training that goes on continues the same run. Where a service cannot be
    reached the files take its place; where these fail too, the training goes on without.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, full_config: Mapping[str, Any], stage: str = "") -> None:
        self._run: Any = None
        project = config.wandb.project or os.environ.get("WANDB_PROJECT") or "unclip"
        self._options = {
            "project": project,
            "name": config.wandb.name or run_dir.name,
            "tags": list(config.wandb.tags),
            "group": config.wandb.group,
            "job_type": stage or None,
            "dir": str(run_dir),
            "config": dict(full_config),
            "resume": "allow",
        }
        mode = mode_from(config.wandb)
        if mode == "disabled":
            return
        try:
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            if mode == "auto":
                mode = "online" if os.environ.get("WANDB_API_KEY") or _stored_key(wandb) else "offline"
            self._options["id"] = _identity(run_dir, project)
            self._run = self._start(wandb, mode)
        except Exception as error:  # not installed, not logged in, no network, a full disk, a change of its interface
            self._fail("could not be started", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            try:
                self._run.log(dict(metrics), step=step)
            except Exception as error:
                self._fail("took no metrics", error)

    def image(self, step: int, name: str, file: Path, caption: str = "") -> None:
        if self._run is not None:
            try:
                import wandb

                self._run.log({name: wandb.Image(str(file), caption=caption or None)}, step=step)
            except Exception as error:
                self._fail("took no image", error)

    def close(self, exit_code: int = 0) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                self._fail("could not be ended", error)
        self._run = None

    def _start(self, wandb: Any, mode: str) -> Any:
        try:
            return wandb.init(**self._options, mode=mode)
        except Exception as error:
            if mode == "offline":
                raise
            warnings.warn(
                f"Weights & Biases could not be reached ({_first_line(error)}); this run is recorded offline in "
                f"{self._options['dir']}/wandb, and `wandb sync` sends it later",
                stacklevel=2,
            )
            return wandb.init(**self._options, mode="offline")

    def _fail(self, what: str, error: Exception) -> None:
        self._run = None
        warnings.warn(
            f"Weights & Biases {what} ({_first_line(error)}); the training goes on without it",
            stacklevel=3,
        )
        if isinstance(error, ConnectionError):
            # Its process is gone: deepspeed's launcher, when it is stopped, ends it before this one. What wandb has
            # registered for this process' end would print a traceback then.
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown(1)


def _stored_key(wandb: Any) -> str | None:
    """The key that `wandb login` has stored. Newer releases print that this way is deprecated; what they offer instead
    asks the service, which takes long where there is no network.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        key: str | None = wandb.api.api_key
    return key


def _identity(run_dir: Path, project: str) -> str:
    """The id of this folder's run in a project: the one it has, or a new one that is kept from now on."""
    import json
    import secrets

    from unclip.bundle import write_json

    file = run_dir / IDENTITY
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["project"] == project:
            return str(kept["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    body = {"project": project, "id": secrets.token_hex(4)}
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, body)
    return body["id"]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
