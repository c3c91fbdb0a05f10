"""Checkpoints as diffusers lays them out on disk (Karlo's pipeline and those of its shape) -> our configurations and
state dicts. `train_*.py` give these readers to their runs, for `init_from`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from decoder import DecoderConfig
from prior import PriorConfig
from unclip.bundle import read_json
from unclip.errors import UnclipError
from unclip.interop.containers import read_container, tensors_of
from unclip.interop.decoder import decoder_from_diffusers
from unclip.interop.prior import prior_from_diffusers
from unclip.interop.super_resolution import upsampler_from_diffusers
from unclip.interop.tensors import WEIGHTS, read_tensors
from upsamplers import UpsamplerConfig


def read_prior(folder: Path) -> tuple[PriorConfig, dict[str, Tensor]]:
    """The prior of a pipeline's folder, or the folder of a `PriorTransformer` itself; without features of the empty
    text, which its own training gets from its CLIP. Raises UnclipError: no such model, or one of another shape.
    """
    state, config = read_prior_model(folder)
    return prior_from_diffusers(state, config)


def read_prior_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config.json of a pipeline's `PriorTransformer`. Raises as `read_prior`."""
    return _model(_inside(folder, "prior"), "PriorTransformer")


def read_decoder(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The decoder of a pipeline's folder: `decoder` and `text_proj`; the folder of either serves as well. As
    `read_prior` otherwise.
    """
    root = folder if (folder / "model_index.json").is_file() else folder.parent
    for name in ("decoder", "text_proj"):
        if not (root / name).is_dir():
            raise UnclipError(
                f"{root} has no folder {name!r}; a decoder in diffusers' layout is two models, decoder and text_proj"
            )
    unet = _model(root / "decoder", "UNet2DConditionModel")
    return decoder_from_diffusers(unet, _model(root / "text_proj", "UnCLIPTextProjModel"))


def read_upsampler(folder: Path) -> tuple[UpsamplerConfig, dict[str, Tensor]]:
    """The super-resolution of a pipeline's folder: `super_res_first` and, where there is one, `super_res_last`; or one
    network's folder. As `read_prior` otherwise.
    """
    if not (folder / "model_index.json").is_file():
        return upsampler_from_diffusers(_model(folder, "UNet2DModel"))
    first = _model(_inside(folder, "super_res_first"), "UNet2DModel")
    last = folder / "super_res_last"
    return upsampler_from_diffusers(first, _model(last, "UNet2DModel") if last.is_dir() else None)


def _inside(folder: Path, name: str) -> Path:
    """A pipeline's sub-folder; a model's own folder is itself."""
    if not (folder / "model_index.json").is_file():
        return folder
    if not (folder / name).is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folders"
        raise UnclipError(f"{folder} has no folder {name!r} (found: {found})")
    return folder / name


def _model(folder: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict in float32 and config.json of one model."""
    file = folder / "config.json"
    if not file.is_file():
        raise UnclipError(f"{folder} is no model of diffusers: config.json is missing")
    config = read_json(file)
    if config.get("_class_name") != expected:
        raise UnclipError(f"{folder} holds a {config.get('_class_name')!r}, expected a {expected!r}")
    state = {name: value.float() if value.is_floating_point() else value for name, value in _tensors(folder).items()}
    return state, {key: value for key, value in config.items() if not key.startswith("_")}


def _tensors(folder: Path) -> dict[str, Tensor]:
    pickled = [folder / f"{name}.bin" for name in (*WEIGHTS, "pytorch_model") if (folder / f"{name}.bin").is_file()]
    if pickled and not any(folder.glob("*.safetensors")):  # tensors alone are read of it
        return tensors_of(pickled[0], read_container(pickled[0]))
    return read_tensors(folder)
