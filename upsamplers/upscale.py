"""Upsamplers on any picture (SR3-style; Saharia et al. 2021): any size and aspect ratio, nothing cropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.errors import UsageError
from upsamplers.sampling import UpsamplerStage

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[str, int, int], None]


def plan_upscale(
    stages: Sequence[UpsamplerStage], longer_edge: int, size: int | None = None, start: int | None = None
) -> list[UpsamplerStage]:
    """The stages that bring a picture to `size`, in order.

    A picture starts at the highest stage whose input edge it fills, so that as little of it as possible is lost; one
    smaller than every stage's input starts at the lowest. `start` names another stage by its input edge.
    Raises UsageError: no such size, no such start.
    """
    sizes = [stage.config.high_size for stage in stages]
    last = sizes.index(check_reach(sizes, size))
    inputs = [stage.config.low_size for stage in stages[: last + 1]]
    if start is None:
        filled = [edge for edge in inputs if edge <= longer_edge]
        start = filled[-1] if filled else inputs[0]
    if start not in inputs:
        raise UsageError(f"no stage up to {sizes[last]} pixels starts from {start} pixels; possible: {_list(inputs)}")
    return list(stages[inputs.index(start) : last + 1])


def check_reach(sizes: Sequence[int], size: int | None) -> int:
    """The size to make, the largest for None. UsageError: not one of the sizes that the upsamplers make."""
    if not sizes:
        raise UsageError("this model has no upsampler, so it cannot upscale; name a model that has one")
    if size is not None and size not in sizes:
        raise UsageError(f"size {size} cannot be reached by this model's upsamplers; they make {_list(sizes)}")
    return sizes[-1] if size is None else size


def upscale_picture(
    stages: Sequence[UpsamplerStage],
    picture: Image | Tensor,
    seed: int = 0,
    *,
    size: int | None = None,
    start: int | None = None,
    steps: int | str | Sequence[int] | None = None,
    noise_level: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """One RGB picture, or a tensor (3, H, W) in [-1, 1], -> (3, H', W') in [-1, 1] whose longer edge is `size`.

    The picture is first brought to the input scale of the stage it starts at (`plan_upscale`), its longer edge then
    being that stage's low_size; both edges grow from there by the stages' whole factors. `noise_level` is for the
    stages trained with noise augmentation, `memory_limit` bytes for each stage (see UpsamplerStage.sample).
    Raises UsageError, UnclipError: as `plan_upscale` and UpsamplerStage.sample.
    """
    longer = max(picture.shape[-2:]) if isinstance(picture, Tensor) else max(picture.size)
    chosen = plan_upscale(stages, longer, size, start)
    image = to_edge(picture, chosen[0].config.low_size)
    told = [stage for stage in chosen if stage.config.noise_augmentation is not None]
    if noise_level is not None and not told:
        chosen[0].check_noise_level(noise_level)
    for stage in chosen:
        name = f"upsampler_{stage.config.high_size}"
        heard = None if progress is None else _named(progress, name)
        level = noise_level if stage in told else None
        image = stage.sample(image, [seed], steps, heard, noise_level=level, memory_limit=memory_limit)
    return image[0]


def to_edge(picture: Image | Tensor, edge: int) -> Tensor:
    """(1, 3, h, w) in [-1, 1], the longer side `edge` pixels, the other in proportion and at least 1."""
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point() or not picture.numel():
            raise UsageError(
                f"a picture as a tensor of shape {tuple(picture.shape)} and {picture.dtype}; "
                "expected (3, H, W), floating point, in [-1, 1]"
            )
        height, width = _proportional(picture.shape[1], picture.shape[2], edge)
        image = picture[None].float()
        if image.shape[-2:] != (height, width):
            image = F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
        return image
    import numpy as np
    from PIL import Image as Pillow

    from unclip.data.images import to_float

    height, width = _proportional(picture.height, picture.width, edge)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Pillow.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # (h, w, 3)
    return to_float(pixels.permute(2, 0, 1))[None].contiguous()


def _proportional(height: int, width: int, edge: int) -> tuple[int, int]:
    longer = max(height, width)
    return max(1, round(height * edge / longer)), max(1, round(width * edge / longer))


def _named(progress: Progress, name: str) -> Callable[[int, int, Tensor], None]:
    return lambda number, total, _x: progress(name, number, total)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
