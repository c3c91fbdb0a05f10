"""Groups of options that commands share: a command takes one as a parameter, and its users see the fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from unclip.cli import options as opt
from unclip.cli.output import PictureWriter

BATCH = 8
"""Pictures drawn together unless something else is asked for."""


def ungrouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: in the place of each parameter that is a group of options stand its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))
            continue
        group = groups[parameter.name]
        types = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(one.name, parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name])
            for one in fields(group)
        ]

    @wraps(command)
    def called(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})  # type: ignore[operator]
        command(**values)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


@dataclass(frozen=True)
class Place:
    """Which model, where it runs, and how what it draws is written and told of."""

    model: opt.Model = "emoji"
    out: opt.Out = None
    device: opt.Device = "auto"
    dtype: opt.Precision = opt.Dtype.float32
    json_lines: opt.Json = False
    overwrite: opt.Overwrite = False
    quiet: opt.Quiet = False

    def writer(self, count: int) -> PictureWriter:
        """Of so many pictures. UsageError: they cannot be written there."""
        return PictureWriter(self.out, count, self.overwrite)

    @property
    def torch_dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype.value)


@dataclass(frozen=True)
class Adapted(Place):
    """Of the commands whose stages may have adapters."""

    adapter: opt.Adapter = None

    def told(self) -> dict[str, str]:
        """What a picture itself says of the adapters that it was drawn with."""
        return {"adapters": opt.places(self.adapter)} if self.adapter else {}


@dataclass(frozen=True)
class Drawing(Adapted):
    """Of the commands that draw from prompts."""

    token: opt.Token = None

    def told(self) -> dict[str, str]:
        """Of the learned tokens too."""
        return {**super().told(), **({"tokens": opt.places(self.token)} if self.token else {})}


@dataclass(frozen=True)
class Series(Drawing):
    """Of the commands that draw several pictures of one kind."""

    num_images: opt.NumImages = 1
    seed: opt.Seed = 0
    batch_size: opt.BatchSize = BATCH
    grid: opt.Grid = False


@dataclass(frozen=True)
class Upsampling:
    """How the upsamplers sample."""

    upsampler_steps: opt.UpsamplerSteps = None
    memory_limit: opt.MemoryLimit = None

    def given(self, **more: Any) -> dict[str, Any]:
        """These and `more`, as far as they are given."""
        return opt.given(**more, **vars(self))


@dataclass(frozen=True)
class Decoding(Upsampling):
    """How decoder and upsamplers sample."""

    guidance: opt.Guidance = None
    decoder_steps: opt.DecoderSteps = None


@dataclass(frozen=True)
class Solving:
    """What the decoder's sampler does, for the commands that draw plainly."""

    guidance_interval: opt.GuidanceInterval = None
    guidance_rescale: opt.GuidanceRescale = None
    sampler: opt.Sampler = None
    eta: opt.Eta = None

    def given(self) -> dict[str, Any]:
        """These, as far as they are given."""
        return opt.given(**vars(self))


@dataclass(frozen=True)
class Sampling(Decoding):
    """How all stages sample."""

    prior_guidance: opt.PriorGuidance = None
    prior_steps: opt.PriorSteps = None
