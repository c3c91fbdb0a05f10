"""Upscaling pictures with a model's upsamplers alone, without CLIP, prior and decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.bundle import BUNDLED, MANIFEST, PARTS, read_manifest, resolve_model
from unclip.errors import UsageError
from unclip.inputs import check_dtype, check_output, check_seeds, resolve_device, to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from upsamplers import UpsamplerStage

Progress = Callable[[str, int, int], None]
"""Hears (stage, steps done, steps in all)."""


@dataclass
class Timings:
    """Seconds spent in each stage by the last call."""

    seconds: dict[str, float] = field(default_factory=dict)


class Upscaling:
    """The methods `upscale` and `restore` of whatever has upsamplers."""

    upsamplers: list[UpsamplerStage]
    device: torch.device
    dtype: torch.dtype
    timings: Timings

    @overload
    def upscale(
        self,
        images: Any,
        *,
        size: int | None = ...,
        seed: int | Sequence[int] = ...,
        output: Literal["pil"] = ...,
        progress: Progress | None = ...,
        **options: Any,
    ) -> list[Image]: ...
    @overload
    def upscale(
        self,
        images: Any,
        *,
        size: int | None = ...,
        seed: int | Sequence[int] = ...,
        output: Literal["tensor"],
        progress: Progress | None = ...,
        **options: Any,
    ) -> list[Tensor]: ...
    def upscale(
        self,
        images: Any,
        *,
        size: int | None = None,
        seed: int | Sequence[int] = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | list[Tensor]:
        """Pictures whose longer edge is `size` pixels (default: the model's largest), in their own aspect ratio.

        `images` is a PIL image, a path, a tensor (3, H, W) in [-1, 1], or a list of those. Each is first reduced to
        the input of the highest stage that it fills (256 px for 256 → 1024), then upsampled from there; a picture
        that fills none is enlarged to the lowest. A single seed serves all pictures; a seed gives the same result
        whatever else is upscaled. Options:
        start: the input edge to begin at instead, such as 64;
        steps: sampling steps of each stage;
        noise_level: noise on the condition, for models trained with noise augmentation;
        memory_limit: MiB for a picture in work beside the weights; what takes more runs in stripes, with equal result.
        Returns PIL images, or with output="tensor" tensors (3, H, W) in [-1, 1]. Raises UsageError, UnclipError: no
        picture, one that cannot be read, a size that the model does not reach, an option it does not know.
        """
        from unclip.data.images import to_pil
        from upsamplers.upscale import upscale_picture

        check_output(output)
        known = ("start", "steps", "noise_level", "memory_limit")
        for name in options:
            if name not in known:
                raise UsageError(f"unknown option {name!r}; known: {', '.join(known)}")
        limit = options.pop("memory_limit", None)
        pictures = pictures_from(images)
        seeds = check_seeds(seed, len(pictures))
        self.timings = Timings()
        results = []
        for picture, one in zip(pictures, seeds, strict=True):
            heard = _clocked(self.timings.seconds, progress)
            with torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
                result = upscale_picture(
                    self.upsamplers, picture, one, size=size, memory_limit=to_bytes(limit), progress=heard, **options
                )
            results.append(result.cpu())
        return results if output == "tensor" else [to_pil(result) for result in results]

    @overload
    def restore(self, images: Any, *, output: Literal["pil"] = ..., **options: Any) -> list[Image]: ...
    @overload
    def restore(self, images: Any, *, output: Literal["tensor"], **options: Any) -> list[Tensor]: ...
    def restore(
        self,
        images: Any,
        *,
        seed: int | Sequence[int] = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | list[Tensor]:
        """Pictures drawn anew by the upsamplers at their own size: rid of what they were trained to undo, which
        in the paper's system and the bundled model is blur, noise and JPEG's blocks.

        A picture is reduced to the input of the highest stage that it more than fills, drawn from there, and brought
        back to its size. `options` and the result are those of `upscale`. Raises UsageError, besides: a picture whose
        longer edge is beyond the upsamplers' largest, or no longer than the smallest's input, or than `start`.
        """
        from unclip.data.images import to_pil
        from upsamplers.upscale import check_reach

        check_output(output)
        sizes = [stage.config.high_size for stage in self.upsamplers]
        largest = check_reach(sizes, None)
        start = options.pop("start", None)
        pictures = pictures_from(images)
        seeds = check_seeds(seed, len(pictures))
        results, spent = [], Timings()
        for picture, one in zip(pictures, seeds, strict=True):
            longer = max(picture.shape[-2:]) if isinstance(picture, Tensor) else max(picture.size)
            inputs = [stage.config.low_size for stage in self.upsamplers if stage.config.low_size < longer]
            if longer > largest or not inputs:
                raise UsageError(
                    f"a picture of {longer} pixels cannot be restored at its size by these upsamplers; expected a "
                    f"longer edge of {self.upsamplers[0].config.low_size + 1} to {largest} pixels (upscale takes any)"
                )
            if start is not None and start >= longer:
                raise UsageError(
                    f"start {start} is no reduction of a picture of {longer} pixels; expected an edge below that"
                )
            size = next(s for s in sizes if s >= longer)
            first = inputs[-1] if start is None else start
            drawn = self.upscale(
                picture, size=size, start=first, seed=one, output="tensor", progress=progress, **options
            )[0]
            for name, seconds in self.timings.seconds.items():
                spent.seconds[name] = spent.seconds.get(name, 0.0) + seconds
            results.append(_fit(drawn, picture))
        self.timings = spent
        return results if output == "tensor" else [to_pil(result) for result in results]


class Upscaler(Upscaling):
    """A model's upsamplers alone. `Upscaler.from_pretrained(name)` loads nothing else of it."""

    def __init__(
        self,
        upsamplers: Sequence[UpsamplerStage],
        name: str = "unnamed",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.upsamplers, self.name = list(upsamplers), name
        self.device, self.dtype = torch.device(device), dtype
        self.timings = Timings()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = BUNDLED,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        size: int | None = None,
        revision: str | None = None,
        adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    ) -> Upscaler:
        """The upsamplers of a bundle up to `size`, or one upsampler by itself: the `model` folder of a run, or that of
        a Karlo in diffusers' layout, of which nothing else is fetched or converted.

        `adapters` as for UnCLIP.from_pretrained, of upsamplers alone; one of another size than these is refused, unless
        `size` has left its upsampler out. Raises UnclipError: no such folder, weights damaged, no such device, an
        adapter of another network; UsageError: no upsampler in it, or none that makes `size`.
        """
        from unclip.adapters import apply_adapters
        from upsamplers import UpsamplerStage
        from upsamplers.upscale import check_reach

        check_dtype(dtype)
        folder = resolve_model(
            name, revision, lambda described: _upsamplers_for(described, size), upsamplers_alone=True
        )
        place = resolve_device(device)
        if (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
            stages = [UpsamplerStage.load(folder, place)]
            label = folder.resolve().name
        else:
            manifest = read_manifest(folder)
            parts: dict[str, str] = manifest["parts"]
            stages = [UpsamplerStage.load(folder / parts[part], place) for part in _upsamplers_for(folder, size)]
            label = str(manifest.get("name") or "unnamed")
        check_reach([stage.config.high_size for stage in stages], size)
        apply_adapters(adapters, {"upsampler": stages}, all_there=size is None)
        if dtype != torch.float32:
            for stage in stages:
                stage.hold_in(dtype)
        return cls(stages, label, place, dtype)


def _upsamplers_for(folder: Path, size: int | None) -> list[str]:
    """The upsamplers of a bundle without which it cannot upscale to `size`; all for None, and for a size it does not
    make.
    """
    from upsamplers import read_upsampler_config

    parts: dict[str, str] = read_manifest(folder)["parts"]
    made = {
        part: read_upsampler_config(folder / parts[part]).high_size
        for part in PARTS[3:]
        if part in parts
    }
    return [part for part in made if size is None or size not in made.values() or made[part] <= size]


def _clocked(seconds: dict[str, float], progress: Progress | None) -> Progress:
    """A listener that adds up the seconds of each stage and passes on what it hears."""
    last = time.perf_counter()

    def hear(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0.0) + now - last
        last = now
        if progress is not None:
            progress(stage, done, total)

    return hear


def _fit(drawn: Tensor, picture: Any) -> Tensor:
    """`drawn` (3, H, W) at the picture's size."""
    size = tuple(picture.shape[-2:]) if isinstance(picture, Tensor) else (picture.height, picture.width)
    if tuple(drawn.shape[-2:]) == size:
        return drawn
    return torch.nn.functional.interpolate(drawn[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def pictures_from(images: Any) -> list[Any]:
    """RGB pictures or tensors (3, H, W) in [-1, 1], from one or several of them, arrays of 8 bits or paths."""
    from unclip.data.images import checked_pixels, picture_of

    if isinstance(images, Tensor) and images.ndim == 4:
        images = list(images)
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if not several:
        raise UsageError("no image given")
    return [checked_pixels(one) if isinstance(one, Tensor) else picture_of(one) for one in several]
