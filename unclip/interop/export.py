"""A bundle of Karlo's shape -> the folders of diffusers' `UnCLIPPipeline` and `UnCLIPImageVariationPipeline`.

diffusers 0.37.1 is the last release that loads such a pipeline; its single networks load in every release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoder import read_decoder_config
from prior import PriorConfig, read_prior_config
from unclip.bundle import read_json, read_manifest, replacing, resolve_model, write_json
from unclip.clip import CONFIG_FILE, IMAGE_ENCODER
from unclip.errors import UnclipError, UsageError
from unclip.interop.clip_part import WEIGHTS
from unclip.interop.clip_towers import clip_to_transformers
from unclip.interop.decoder import decoder_to_diffusers
from unclip.interop.karlo import NETWORKS
from unclip.interop.prior import prior_to_diffusers
from unclip.interop.schedulers import FILE, scheduler_from
from unclip.interop.super_resolution import upsampler_to_diffusers
from unclip.interop.tensors import check_shapes, read_tensors
from unclip.interop.vocabulary import read_bpe, write_tokenizer
from unclip.upscaling import Progress
from upsamplers import read_upsampler_config

TEXT, VARIATIONS = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
LAST_RELEASE = "0.37.1"
_FILE = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "feature_extractor": "CLIPImageProcessor",
}

Model = tuple[Mapping[str, Tensor], Mapping[str, Any]]


def export_diffusers(
    bundle: str | Path,
    out: Path,
    *,
    pipeline: str | None = None,
    parts: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a bundle, or `parts` of it alone ('prior', 'decoder', 'upsampler_256', 'clip'), in diffusers' layout.

    `pipeline`: TEXT, by default where the bundle has a prior, or VARIATIONS. Returns what had to be left out, in words:
    the 256 → 1024 stage, for which diffusers has no place. Raises UnclipError: a part that diffusers cannot express,
    with the field that does not fit; a part that the pipeline needs and the bundle lacks; `out` exists.
    """
    folder = resolve_model(bundle)
    named: dict[str, str] = read_manifest(folder)["parts"]
    known = (*NETWORKS, "clip")
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise UsageError(f"no part {unknown[0]!r} goes to diffusers; known: {', '.join(known)}")
    if parts and pipeline is not None:
        raise UsageError("a pipeline is written whole; name either a pipeline or parts")
    pipeline = pipeline or (TEXT if "prior" in named else VARIATIONS)
    needed = list(parts) or ["clip", "decoder", "upsampler_256", *(["prior"] if pipeline == TEXT else [])]
    for part in needed:
        if part not in named:
            what = "this export" if parts else f"a {pipeline}"
            raise UnclipError(f"{folder} has no {part!r}, which {what} needs; it has {', '.join(named)}")
    _check_free(out, overwrite)
    sees = not parts and pipeline == VARIATIONS
    _check(folder, named, needed, sees)
    with replacing(out) as temporary:
        libraries: dict[str, Any] = {}
        for number, part in enumerate(needed):
            if progress is not None:
                progress(f"writing {part}", number, len(needed))
            if part == "clip":
                _write_clip(folder / named[part], temporary, libraries, both=bool(parts), image=sees)
            else:
                _write_networks(part, folder / named[part], temporary, libraries)
        if not parts:
            order = {"_class_name": pipeline, "_diffusers_version": LAST_RELEASE}
            write_json(temporary / "model_index.json", {**order, **dict(sorted(libraries.items()))})
        if progress is not None:
            progress("writing", len(needed), len(needed))
    return [f"{part} (diffusers' unCLIP ends at 256 px)" for part in named if part == "upsampler_1024" and not parts]


def _check(folder: Path, named: Mapping[str, str], needed: Sequence[str], sees: bool) -> None:
    """Every configuration and every shape, on the meta device, before anything is written."""
    sizes: dict[str, Any] = {}
    for part in needed:
        place = folder / named[part]
        if part == "clip":
            body = read_json(place / CONFIG_FILE)
            if sees and not body.get(IMAGE_ENCODER, True):
                raise UnclipError(f"clip: image_encoder is false in {place / CONFIG_FILE}; a {VARIATIONS} needs one")
            continue
        config = _config(part, place)
        with torch.device("meta"):
            network = NETWORKS[part][1](config)
        _networks(part, config, network.state_dict())
        _schedulers(part, config)
        sizes[part] = config
    if {"decoder", "upsampler_256"} <= set(sizes):
        low = sizes["upsampler_256"].low_size
        if sizes["upsampler_256"].factor != 4:
            raise UnclipError(
                f"upsampler_256: it enlarges {low} to {sizes['upsampler_256'].high_size} px; import reads a factor of 4"
            )


def _config(part: str, folder: Path) -> Any:
    if part == "prior":
        config = read_prior_config(folder)
        if not isinstance(config, PriorConfig):
            raise UnclipError("prior: kind is 'autoregressive'; diffusers' PriorTransformer is a diffusion prior")
        return config
    read = read_decoder_config if part == "decoder" else read_upsampler_config
    found = read(folder)
    if getattr(found, "architecture", None) == "dalle2":
        raise UnclipError(f"{part}: it is one of DALLE2-pytorch's, which diffusers has no network for")
    return found


def _networks(part: str, config: Any, state: Mapping[str, Tensor]) -> dict[str, Model]:
    """Our part -> the networks that diffusers keeps it in, by folder."""
    try:
        if part == "prior":
            body, tensors = prior_to_diffusers(config, state)
            return {"prior": (tensors, body)}
        if part == "decoder":
            unet, projection = decoder_to_diffusers(config, state)
            return {"decoder": unet, "text_proj": projection}
        first, last = upsampler_to_diffusers(config, state)
    except UnclipError as error:
        raise UnclipError(f"{part}: {error}") from error
    # A network trained on crops names their size; the pipeline reads the picture's here.
    both = {"super_res_first": first, "super_res_last": first if last is None else last}
    return {name: (tensors, {**body, "sample_size": config.high_size}) for name, (tensors, body) in both.items()}


def _schedulers(part: str, config: Any) -> dict[str, dict[str, Any]]:
    name = {"prior": "prior_scheduler", "decoder": "decoder_scheduler", "upsampler_256": "super_res_scheduler"}[part]
    limit = config.clip_range if part == "prior" else 1.0
    return {name: scheduler_from(config.diffusion, part, limit)}


def _write_networks(part: str, source: Path, target: Path, libraries: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    config, state = _config(part, source), read_tensors(source)
    with torch.device("meta"):
        own = NETWORKS[part][1](config)
    check_shapes(own.state_dict(), state, str(source))
    for name, (tensors, body) in _networks(part, config, state).items():
        (target / name).mkdir()
        write_json(target / name / "config.json", {**body, "_diffusers_version": LAST_RELEASE})
        save_file({key: one.contiguous() for key, one in tensors.items()}, target / name / _FILE, {"format": "pt"})
        (target / name / _FILE).chmod(0o644)
        libraries[name] = ["unclip" if name == "text_proj" else "diffusers", body["_class_name"]]
    for name, body in _schedulers(part, config).items():
        (target / name).mkdir()
        write_json(target / name / FILE, {**body, "_diffusers_version": LAST_RELEASE})
        libraries[name] = ["diffusers", body["_class_name"]]


def _write_clip(source: Path, target: Path, libraries: dict[str, Any], *, both: bool, image: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    body = read_json(source / CONFIG_FILE)
    config = body.get("model_cfg") or {}
    if not (source / WEIGHTS).is_file():
        raise UnclipError(f"clip: {source} has no {WEIGHTS}; bundle it again with `unclip bundle`")
    try:
        state = load_file(source / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UnclipError(f"{source / WEIGHTS} is damaged or not a safetensors file: {error}") from error
    text, picture = clip_to_transformers(config, {**state, "logit_scale": state["logit_scale"].reshape(())})
    towers = {"text_encoder": text}
    if image or (both and body.get(IMAGE_ENCODER, True)):
        towers["image_encoder"] = picture
        _write_processor(target / "feature_extractor", body.get("preprocess_cfg") or {}, picture[1]["image_size"])
        libraries["feature_extractor"] = ["transformers", _TRANSFORMERS["feature_extractor"]]
    for name, (tensors, described) in towers.items():
        (target / name).mkdir()
        kind = next(iter(tensors.values())).dtype
        described = {**described, "torch_dtype": str(kind).removeprefix("torch.")}
        write_json(target / name / "config.json", described)
        save_file(dict(tensors), target / name / "model.safetensors", {"format": "pt"})
        (target / name / "model.safetensors").chmod(0o644)
        libraries[name] = ["transformers", _TRANSFORMERS[name]]
    bpe = (config["text_cfg"].get("tokenizer_kwargs") or {}).get("bpe_path")
    write_tokenizer(
        target / "tokenizer",
        read_bpe(None if bpe is None else source / Path(bpe).name),
        config["text_cfg"].get("context_length", 77),
    )
    libraries["tokenizer"] = ["transformers", _TRANSFORMERS["tokenizer"]]


def _write_processor(folder: Path, preprocess: Mapping[str, Any], size: int) -> None:
    folder.mkdir()
    body = {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    names = {"mean": "image_mean", "std": "image_std"}
    given = {theirs: list(preprocess[ours]) for ours, theirs in names.items() if preprocess.get(ours)}
    write_json(folder / "preprocessor_config.json", {**body, **given})


def _check_free(out: Path, overwrite: bool) -> None:
    """UnclipError when a pipeline cannot take this place; nothing but a folder of models is ever replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UnclipError(f"{out} exists and is not a folder; name another")
    if not out.exists() or not any(out.iterdir()):
        return
    marks = ("model_index.json", "prior/config.json", "decoder/config.json", "super_res_first/config.json")
    if not any((out / mark).is_file() for mark in marks):
        raise UnclipError(f"{out} holds something else than a model of diffusers, so it is not replaced; name another")
    if not overwrite:
        raise UnclipError(f"{out} exists; pass --overwrite to replace it, or name another folder")
