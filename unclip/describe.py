"""What `unclip info` tells: the installation and a model, read from its files without loading it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from unclip import __version__
from unclip.autoencoder import CARRIED
from unclip.bundle import MANIFEST, read_manifest, read_part_json, read_shards, resolve_described
from unclip.config import parse_config
from unclip.config_latent import LatentConfig
from unclip.errors import UnclipError
from unclip.hub import EVERYTHING, Remote, matching, read_shapes
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
    """A bundle's parts with parameters, bytes and defaults, its sizes and the prompts it knows. Of a model on the Hub
    only descriptions and the headers of weights are fetched; somebody else's checkpoint there is told of by its
    folders. Raises UnclipError.
    """
    folder, remote = resolve_described(name)
    files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if remote is not None:
        files |= matching(remote.sizes, EVERYTHING)
    there = _Files(folder, remote, files)
    if remote is not None and not (folder / MANIFEST).is_file():
        return _describe_foreign(remote, there)
    manifest = read_manifest(folder)
    parts: dict[str, str] = manifest["parts"]
    return {
        "name": manifest.get("name", folder.name),
        "folder": str(folder),
        "version": manifest.get("version"),
        "license": manifest.get("license"),
        "bytes": sum(files.values()),
        "sizes": list(bundle_sizes(folder, parts)) if "decoder" in parts else [],
        "parts": {part: _describe_part(part, inside, there) for part, inside in parts.items()},
        "example_prompts": manifest.get("example_prompts", []),
    }


class _Files(NamedTuple):
    """The files of a model by name, with their bytes; weights may still be on the Hub."""

    folder: Path
    remote: Remote | None
    sizes: dict[str, int]

    def below(self, name: str) -> list[str]:
        return [file for file in self.sizes if file.startswith(f"{name}/")]

    def missing(self, name: str) -> list[str]:
        """Weights of a part that are not there."""
        below = self.below(name)
        index = f"{name}/model.safetensors.index.json"
        if index in below and (self.folder / index).is_file():
            return [file for file in read_shards(self.folder / index) if f"{name}/{file}" not in below]
        return [] if any(file.endswith(".safetensors") for file in below) else ["model.safetensors"]

    def parameters(self, files: Iterable[str]) -> int:
        found = [self._shapes(file) for file in files if file.endswith(".safetensors")]
        return sum(prod(shape) for shapes in found for shape in shapes)

    def _shapes(self, name: str) -> Sequence[tuple[int, ...]]:
        if self.remote is None or (self.folder / name).is_file():
            return list(_shapes(self.folder / name))
        return read_shapes(self.remote, name)


def _describe_part(part: str, inside: str, there: _Files) -> dict[str, Any]:
    files = there.below(inside)
    carried = there.below(f"{inside}/{CARRIED}")
    body: dict[str, Any] = {
        "folder": Path(inside).name,
        "parameters": there.parameters(sorted(set(files) - set(carried))),
        "bytes": sum(there.sizes[file] for file in files),
        "defaults": _defaults(part, there.folder / inside),
        "missing": there.missing(inside),
    }
    latent = _latent(part, there.folder / inside)
    if latent is not None:
        told = latent.model_dump(include={"name", "channels", "factor"})
        body["latents"] = {**told, "carried": bool(carried)}
        if carried:
            body["latents"]["parameters"] = there.parameters(carried)
    return body


def _describe_foreign(remote: Remote, there: _Files) -> dict[str, Any]:
    """A checkpoint of another project on the Hub, which is converted when it is first used."""
    folders = sorted({file.partition("/")[0] for file in there.sizes if file.endswith(".safetensors") and "/" in file})
    if not folders:
        raise UnclipError(f"{remote.name.repo} on the Hub holds neither {MANIFEST} nor folders with weights")
    return {
        "name": remote.name.repo,
        "folder": str(there.folder),
        "version": remote.sha,
        "license": None,
        "bytes": sum(there.sizes.values()),
        "sizes": [],
        "parts": {
            name: {
                "folder": name,
                "parameters": there.parameters(there.below(name)),
                "bytes": sum(there.sizes[file] for file in there.below(name)),
                "defaults": {},
                "missing": [],
            }
            for name in folders
        },
        "example_prompts": [],
    }


def _latent(part: str, folder: Path) -> LatentConfig | None:
    """The latents that a part works in, None for pixels."""
    if part != "decoder" and not part.startswith("upsampler"):
        return None
    named = read_part_json(folder, "decoder" if part == "decoder" else "upsampler")["config"].get("latent")
    return None if named is None else parse_config(LatentConfig, named, origin=str(folder / "config.json"))


def _defaults(part: str, folder: Path) -> dict[str, Any]:
    """How the part samples unless told otherwise."""
    from decoder import read_decoder_config
    from prior import AutoregressivePriorConfig, read_prior_config
    from upsamplers import read_upsampler_config

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
        upsampler = read_upsampler_config(folder)
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
