"""What `unclip info` tells: the installation and a model, read from its files without loading it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from unclip import __version__
from unclip.bundle import read_config, read_manifest, resolve_model
from unclip.errors import UnclipError
from unclip.parts import bundle_sizes

_PACKAGES = (
    "torch", "open_clip_torch", "x-transformers", "deepspeed", "datasets", "numpy", "wandb", "safetensors",
    "huggingface_hub", "pydantic", "typer", "tqdm", "Pillow", "PyYAML",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions of this package, Python and the packages it stands on, and the devices."""
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "unclip": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "devices": devices,
        "packages": packages,
    }


def describe_model(name: str | Path) -> dict[str, Any]:
    """A bundle's parts with parameters, bytes and defaults, its sizes and the prompts it knows. Raises
    UnclipError.
    """
    folder = resolve_model(name)
    manifest = read_manifest(folder)
    parts: dict[str, str] = manifest["parts"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        "name": manifest.get("name", folder.name),
        "folder": str(folder),
        "version": manifest.get("version"),
        "license": manifest.get("license"),
        "bytes": sum(file.stat().st_size for file in files),
        "sizes": list(bundle_sizes(folder, parts)) if "decoder" in parts else [],
        "parts": {part: _describe_part(part, folder / inside) for part, inside in parts.items()},
        "example_prompts": manifest.get("example_prompts", []),
    }


def _describe_part(part: str, folder: Path) -> dict[str, Any]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    shapes = [shape for file in files if file.suffix == ".safetensors" for shape in _shapes(file)]
    return {
        "folder": folder.name,
        "parameters": sum(prod(shape) for shape in shapes),
        "bytes": sum(file.stat().st_size for file in files),
        "defaults": _defaults(part, folder),
    }


def _defaults(part: str, folder: Path) -> dict[str, Any]:
    """How the part samples unless told otherwise."""
    from decoder import read_decoder_config
    from prior import AutoregressivePriorConfig, read_prior_config
    from upsamplers import UpsamplerConfig

    if part == "prior":
        prior = read_prior_config(folder)
        shared = {"guidance": prior.guidance, "candidates": prior.candidates}
        if isinstance(prior, AutoregressivePriorConfig):
            return {"kind": prior.kind, "components": prior.components, **shared}
        return {"steps": prior.steps, "sampler": prior.sampler, **shared}
    if part == "decoder":
        decoder = read_decoder_config(folder)
        return {"steps": decoder.steps, "guidance": decoder.guidance, "sampler": decoder.sampler}
    if part.startswith("upsampler"):
        upsampler = read_config(folder, "upsampler", UpsamplerConfig)
        return {"steps": upsampler.steps, "sampler": upsampler.sampler}
    return {}


def _shapes(file: Path) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield from (tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnclipError(f"{file} is damaged or not a safetensors file: {error}") from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
