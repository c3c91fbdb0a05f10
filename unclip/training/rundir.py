"""A run's folder: made, and refused where it holds something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from unclip.config import Config, TrainConfig
from unclip.errors import UnclipError
from unclip.runs import trainer_of
from unclip.training.distributed import Distributed
from unclip.training.guard import ENDED
from unclip.training.settings import deepspeed_config


def open_run(run_dir: Path, run_config: Config, train: TrainConfig, distributed: Distributed) -> None:
    """Make the folder and record the configuration and DeepSpeed's; refuse a folder that holds a run of another
    model, or in which another process trains."""
    file = run_dir / "config.yaml"
    body = run_config.model_dump(mode="json")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if file.exists() and (run_dir / "checkpoints").exists():
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(before, dict) and _model_of(before, run_config) != body.get("model"):
                raise UnclipError(f"{run_dir} holds a run of another model (see {file}); choose another train.run_dir")
        if distributed.is_main:  # the others might meet the status that this one writes soon
            other = trainer_of(run_dir)
            if other is not None:
                raise UnclipError(
                    f"{other} trains in {run_dir} already; let it end, stop it, or choose another train.run_dir"
                )
            (run_dir / ENDED).unlink(missing_ok=True)
            _record(file, yaml.safe_dump(body, sort_keys=False))
            settings = deepspeed_config(train, distributed.world_size)
            _record(run_dir / "deepspeed.json", json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UnclipError(f"the run folder {run_dir} cannot be written: {error.strerror or error}") from error


def _record(file: Path, text: str) -> None:
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _model_of(before: dict[str, Any], run_config: Config) -> Any:
    """The model of a recorded configuration, with today's defaults where it is older than an option."""
    try:
        return type(run_config).model_validate(before).model_dump(mode="json").get("model")
    except ValidationError:
        return before.get("model")
