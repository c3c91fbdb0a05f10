"""Karlo whole -> a bundle: from diffusers' folders here, from the original checkpoints in `karlo_original`.

Everything is checked on headers and configurations first; then one part after the other is read, memory-mapped, renamed
and written, so that no two of them are in memory together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from decoder import Decoder, DecoderConfig
from prior import Prior, PriorConfig
from unclip.autoencoder import CARRIED, carry
from unclip.bundle import (
    FORMAT,
    MANIFEST,
    read_json,
    read_part_json,
    replacing,
    save_part,
    write_json,
)
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.errors import UnclipError
from unclip.interop.clip_part import preprocessing, write_clip, write_named_clip
from unclip.interop.clip_towers import clip_from_transformers
from unclip.interop.decoder import decoder_from_diffusers
from unclip.interop.prior import prior_from_diffusers
from unclip.interop.schedulers import diffusion_of, prior_sampling_of, read_scheduler
from unclip.interop.super_resolution import Model, upsampler_from_diffusers
from unclip.interop.tensors import as_dtype, check_shapes, read_headers, read_tensors
from unclip.interop.vocabulary import read_merges
from unclip.parts import check_fit
from unclip.upscaling import Progress
from upsamplers import Upsampler, UpsamplerConfig, read_upsampler_config

SHARD_BYTES = 256 * 2**20  # written through memory, so not larger
NETWORKS: dict[str, tuple[str, Callable[[Any], torch.nn.Module]]] = {
    "prior": ("prior", Prior),
    "decoder": ("decoder", Decoder),
    "upsampler_256": ("upsampler", Upsampler),
}
"""Parts of a bundle that are converted: the kind of each, and its network."""


@dataclass(frozen=True)
class ConvertOptions:
    """What a conversion leaves to its user.

    `clip`: a CLIP as FrozenCLIP.load takes it, in the place of the checkpoint's own. `upsampler_1024`: the folder of a
    trained 256 → 1024 part. `dtype`: of the stored weights; None keeps that of the checkpoint.
    """

    clip: str | None = None
    upsampler_1024: Path | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False
    name: str | None = None


class Checkpoint(Protocol):
    """A Karlo somewhere on disk. `weights` false: configurations and tensors on the meta device, nothing read."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Of 'prior', 'decoder', 'upsampler_256' those that are there."""
        ...

    def part(
        self, name: str, null: TextFeatures | None, *, weights: bool
    ) -> tuple[PriorConfig | DecoderConfig | UpsamplerConfig, dict[str, Tensor]]: ...

    def write_clip(self, folder: Path, options: ConvertOptions) -> None: ...

    def origin(self) -> dict[str, Any]:
        """What the manifest tells of where this comes from."""
        ...


class DiffusersKarlo:
    """Folders in the layout of `kakaobrain/karlo-v1-alpha` and of its image-variations repository; a part is taken from
    the first folder that has it.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [Path(folder) for folder in folders]

    def place(self, name: str) -> Path | None:
        """The sub-folder of that name."""
        return next((folder / name for folder in self.folders if (folder / name).is_dir()), None)

    @property
    def parts(self) -> tuple[str, ...]:
        first = {"prior": "prior", "decoder": "decoder", "upsampler_256": "super_res_first"}
        return tuple(part for part, name in first.items() if self.place(name) is not None)

    def part(
        self, name: str, null: TextFeatures | None, *, weights: bool
    ) -> tuple[PriorConfig | DecoderConfig | UpsamplerConfig, dict[str, Tensor]]:
        if name == "prior":
            state, config = self._model("prior", "PriorTransformer", weights)
            sampling = prior_sampling_of(self._scheduler("prior_scheduler"))
            with told(self._needed("prior")):
                return prior_from_diffusers(state, config, null, **sampling)
        if name == "decoder":
            unet = self._model("decoder", "UNet2DConditionModel", weights)
            projection = self._model("text_proj", "UnCLIPTextProjModel", weights)
            with told(self._needed("decoder")):
                length = _text_length(self.place("text_encoder"))
                process = diffusion_of(self._scheduler("decoder_scheduler"))
                learned = unet[1].get("out_channels", 4) == 6
                if learned != (process["variance"] == "learned_range"):
                    raise UnclipError(
                        f"the decoder has {unet[1].get('out_channels')} output channels and its scheduler the variance "
                        f"{process['variance']!r}; expected learned_range with 6 and fixed_small_log with 3"
                    )
                return decoder_from_diffusers(unet, projection, null, text_length=length, diffusion=process)
        first = self._model("super_res_first", "UNet2DModel", weights)
        last = self._model("super_res_last", "UNet2DModel", weights) if self.place("super_res_last") else None
        if last is not None and last[1].get("sample_size") is None:  # as in the published folder
            last = last[0], {**last[1], "sample_size": first[1].get("sample_size")}
        with told(self._needed("super_res_first")):
            process = diffusion_of(self._scheduler("super_res_scheduler"))
            return upsampler_from_diffusers(first, last, diffusion=process)

    def write_clip(self, folder: Path, options: ConvertOptions) -> None:
        if options.clip is not None:
            write_named_clip(folder, options.clip, options.dtype)
            return
        text, image = self._needed("text_encoder"), self.place("image_encoder")
        with told(text):
            towers = _tower(text), None if image is None else _tower(image)
            config, state = clip_from_transformers(*towers)
        tokenizer = self.place("tokenizer")
        merges = None if tokenizer is None else read_merges(tokenizer)
        if merges is None and config["text_cfg"]["vocab_size"] != 49408:
            raise UnclipError(f"{text.parent} has no folder 'tokenizer', and its vocabulary is not CLIP's own")
        if merges is not None and len(merges) + 514 != config["text_cfg"]["vocab_size"]:
            raise UnclipError(
                f"{tokenizer} has {len(merges) + 514} tokens, the text encoder {config['text_cfg']['vocab_size']}"
            )
        preprocess = preprocessing(self.place("feature_extractor"), config["vision_cfg"]["image_size"])
        write_clip(folder, config, as_dtype(state, options.dtype, "the CLIP"), merges, preprocess, sees=bool(image))

    def origin(self) -> dict[str, Any]:
        return {"layout": "diffusers", "from": [folder.absolute().name for folder in self.folders]}

    def _needed(self, name: str) -> Path:
        place = self.place(name)
        if place is None:
            where = " and ".join(str(folder) for folder in self.folders)
            raise UnclipError(f"{where}: no folder {name!r}, which this layout has")
        return place

    def _scheduler(self, name: str) -> dict[str, Any]:
        return read_scheduler(self._needed(name))

    def _model(self, name: str, expected: str, weights: bool) -> Model:
        folder = self._needed(name)
        file = folder / "config.json"
        if not file.is_file():
            raise UnclipError(f"{folder} is no model of diffusers: config.json is missing")
        config = read_json(file)
        if config.get("_class_name") != expected:
            raise UnclipError(f"{folder} holds a {config.get('_class_name')!r}, expected a {expected!r}")
        state = read_tensors(folder) if weights else read_headers(folder)
        return state, {key: value for key, value in config.items() if not key.startswith("_")}


def write_bundle(
    checkpoint: Checkpoint, out: Path, options: ConvertOptions | None = None, progress: Progress | None = None
) -> None:
    """A checkpoint -> a bundle at `out`, which exists when all of it is written.

    Raises UnclipError: `out` exists and `overwrite` is not set, is no bundle or too small a disk; parts that are
    missing, damaged or do not fit each other; a 256 → 1024 part that does not follow this model.
    """
    options = options or ConvertOptions()
    check_free(out, options.overwrite)
    if "decoder" not in checkpoint.parts:
        raise UnclipError(f"no decoder in this checkpoint (found: {', '.join(checkpoint.parts) or 'nothing'})")
    plans = {name: _checked(checkpoint, name) for name in checkpoint.parts}
    configs = {name: config for name, (config, _) in plans.items()}
    sizes = {name: size for name, (_, size) in plans.items()}
    larger = None
    if options.upsampler_1024 is not None:
        larger = read_upsampler_config(options.upsampler_1024)
    with replacing(out) as temporary:
        _check_space(temporary, sum(sizes.values()))
        total, done = sum(sizes.values()), 0
        checkpoint.write_clip(temporary / "clip", options)
        null = _null_of(temporary / "clip", configs, larger)
        for name in checkpoint.parts:
            if progress is not None:
                progress(f"converting {name}", done // 2**20, max(1, total // 2**20))
            config, state = checkpoint.part(name, null, weights=True)
            state = as_dtype(state, options.dtype, name)
            save_part(temporary / name, NETWORKS[name][0], config, state, max_shard_bytes=SHARD_BYTES)
            del state  # before the next one is mapped
            done += sizes[name]
        parts = ["clip", *checkpoint.parts]
        if options.upsampler_1024 is not None:
            source, target = options.upsampler_1024, temporary / "upsampler_1024"
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(CARRIED))
            write_json(target / "config.json", carry(read_part_json(source, "upsampler"), source, target))
            parts.append("upsampler_1024")
        body = {"format": FORMAT, "parts": {name: name for name in parts}, "name": options.name or out.absolute().name}
        write_json(temporary / MANIFEST, {**body, "source": checkpoint.origin()})
    if progress is not None:
        progress("converting", max(1, total // 2**20), max(1, total // 2**20))


def write_part(checkpoint: Checkpoint, name: str, out: Path) -> None:
    """One part of a checkpoint that needs no CLIP, its upsampler, -> the folder `out`. Raises UnclipError: missing,
    damaged, or not of our network's shape.
    """
    _checked(checkpoint, name)
    config, state = checkpoint.part(name, None, weights=True)
    save_part(out, NETWORKS[name][0], config, as_dtype(state, None, name), max_shard_bytes=SHARD_BYTES)


def check_free(out: Path, overwrite: bool) -> None:
    """UnclipError when a bundle cannot take this place; nothing but a bundle is ever replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UnclipError(f"{out} exists and is not a folder; name another")
    if out.exists() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UnclipError(
                f"{out} is not a bundle ({MANIFEST} is missing), so it is not replaced; name another folder"
            )
        if not overwrite:
            raise UnclipError(f"{out} exists; pass --overwrite to replace it, or name another folder")


@contextmanager
def told(where: Path) -> Iterator[None]:
    """What a config.json lacks or holds of a wrong type becomes one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UnclipError(f"the model in {where} cannot be read: {what}") from error


def _checked(checkpoint: Checkpoint, name: str) -> tuple[Any, int]:
    """Configuration and bytes of a part, whose tensors were compared with the network's before any was read."""
    config, state = checkpoint.part(name, None, weights=False)
    with torch.device("meta"):
        own = NETWORKS[name][1](config).state_dict()
    check_shapes(own, state, name)
    wrong = [key for key, tensor in own.items() if tensor.is_floating_point() != state[key].is_floating_point()]
    if wrong:
        raise UnclipError(f"{name}: {wrong[0]} is of type {str(state[wrong[0]].dtype)[6:]}; expected floats")
    return config, sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _null_of(folder: Path, configs: Mapping[str, Any], larger: UpsamplerConfig | None) -> TextFeatures:
    """The CLIP's features of '', once everything is known to fit it."""
    clip = FrozenCLIP.load(str(folder))
    stages = {name: SimpleNamespace(config=config) for name, config in configs.items()}
    chain: list[Any] = [stages["upsampler_256"]] if "upsampler_256" in stages else []
    if larger is not None:
        chain.append(SimpleNamespace(config=larger))
    decoder: Any = stages["decoder"]
    prior: Any = stages.get("prior")
    check_fit(clip, decoder, prior, chain)
    return clip.encode_text([""])


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UnclipError(
            f"the converted model takes {needed / 2**30:.1f} GiB, and {folder.parent} has {free / 2**30:.1f} GiB free"
        )


def _tower(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not (folder / "config.json").is_file():
        raise UnclipError(f"{folder} is no model of transformers: config.json is missing")
    return read_tensors(folder), read_json(folder / "config.json")


def _text_length(folder: Path | None) -> int:
    if folder is None or not (folder / "config.json").is_file():
        return 77
    return int(read_json(folder / "config.json").get("max_position_embeddings", 77))
