"""diffusers' `UnCLIPScheduler` (`scheduler_config.json`) <-> the process of our stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip.bundle import read_json
from unclip.config import DiffusionConfig
from unclip.errors import UnclipError

FILE = "scheduler_config.json"
CLASS = "UnCLIPScheduler"
# Theirs -> ours.
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x_start"}
_VARIANCES = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "beta_schedule": "squaredcos_cap_v2",
}


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The options of a pipeline's scheduler, defaults filled in. UnclipError: another scheduler, or unknown options."""
    file = folder / FILE
    if not file.is_file():
        raise UnclipError(f"{folder} is no scheduler of diffusers: {FILE} is missing")
    body = read_json(file)
    if body.get("_class_name", CLASS) != CLASS:
        raise UnclipError(f"{file} is a {body['_class_name']!r}; expected an {CLASS!r}, which Karlo samples with")
    options = {**_DEFAULTS, **{name: value for name, value in body.items() if name in _DEFAULTS}}
    known: dict[str, Mapping[str, str]] = {"prediction_type": _PREDICTIONS, "variance_type": _VARIANCES}
    for name, table in known.items():
        if options[name] not in table:
            raise UnclipError(f"{file} has {name} {options[name]!r}; expected one of {', '.join(table)}")
    if options["beta_schedule"] != _DEFAULTS["beta_schedule"]:
        raise UnclipError(f"{file} has beta_schedule {options['beta_schedule']!r}; expected 'squaredcos_cap_v2'")
    return options


def diffusion_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The section `diffusion` of a stage that clamps to ±1 unless told otherwise (decoder, upsampler)."""
    limit = float(options["clip_sample_range"])
    clip: dict[str, Any] | None = None
    if not options["clip_sample"]:
        clip = {"kind": "none"}
    elif limit != 1:
        clip = {"kind": "static", "limit": limit}
    return {**_process(options), "x_start_clip": clip}


def prior_sampling_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """`diffusion` and `clip_range` of the prior."""
    limit = float(options["clip_sample_range"]) if options["clip_sample"] else None
    return {"diffusion": _process(options), "clip_range": limit}


def scheduler_from(config: DiffusionConfig, part: str, clip_range: float | None = 1.0) -> dict[str, Any]:
    """Our process -> the scheduler_config.json that samples as we do; `clip_range` is the stage's own clamp.

    Raises UnclipError naming the first field that an UnCLIPScheduler cannot express.
    """
    expected: dict[str, tuple[str, ...]] = {
        "schedule": ("cosine",),
        "prediction": tuple(_PREDICTIONS.values()),
        "variance": tuple(_VARIANCES.values()),
    }
    for name, values in expected.items():
        if getattr(config, name) not in values:
            raise UnclipError(
                f"{part}: diffusion.{name} is {getattr(config, name)!r}; diffusers' {CLASS} has {' or '.join(values)}"
            )
    if config.zero_terminal_snr:
        raise UnclipError(f"{part}: diffusion.zero_terminal_snr is true; diffusers' {CLASS} has no such schedule")
    clip = config.x_start_clip
    if clip is not None:
        if clip.kind == "dynamic":
            raise UnclipError(f"{part}: diffusion.x_start_clip.kind is 'dynamic'; diffusers' {CLASS} has none such")
        clip_range = clip.limit if clip.kind == "static" else None
    back = {ours: theirs for table in (_PREDICTIONS, _VARIANCES) for theirs, ours in table.items()}
    return {
        "_class_name": CLASS,
        "num_train_timesteps": config.timesteps,
        "variance_type": back[config.variance],
        "clip_sample": clip_range is not None,
        "clip_sample_range": 1.0 if clip_range is None else clip_range,
        "prediction_type": back[config.prediction],
        "beta_schedule": _DEFAULTS["beta_schedule"],
    }


def _process(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schedule": "cosine",
        "timesteps": options["num_train_timesteps"],
        "prediction": _PREDICTIONS[options["prediction_type"]],
        "variance": _VARIANCES[options["variance_type"]],
    }
