"""Trained parts become one bundle: copied, converted, described by a manifest, and loaded once before it
counts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unclip.adapters import apply_adapters, parse_adapter, read_adapter
from unclip.autoencoder import carry
from unclip.bundle import (
    FORMAT,
    MANIFEST,
    PARTS,
    PCA,
    load_weights,
    read_manifest,
    read_part_json,
    read_statistics,
    replacing,
    resolve_model,
    save_part,
    save_statistics,
    save_weights,
    write_json,
)
from unclip.clip_identity import CONFIG_FILE, WEIGHTS_FILE, identify, same_clip
from unclip.components import PrincipalComponents
from unclip.errors import UnclipError, UsageError, contents
from unclip.pipeline import UnCLIP

_KINDS = {"prior": "prior", "decoder": "decoder", "upsampler_256": "upsampler", "upsampler_1024": "upsampler"}
_CLIP_WEIGHTS = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "model.safetensors")
_CLIP_EXTRAS = (".json", ".txt", ".gz", ".model")  # configuration, vocabulary, tokenizer


def assemble(
    out: Path,
    parts: Mapping[str, Path],
    details: Mapping[str, Any] | None = None,
    card: Path | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    overwrite: bool = False,
) -> None:
    """Write a bundle to the folder `out`.

    `parts` maps 'clip', 'decoder' and optionally 'prior', 'upsampler_256', 'upsampler_1024', 'pca' to folders;
    `details` goes into the manifest (name, version, license, example_prompts); `card` becomes README.md;
    weights are stored as `dtype`. The autoencoder of a part in latents is copied into the part where it is a folder, as
    it is; one of the Hub stays a name. Raises UnclipError: `out` exists and `overwrite` is not set, a part is
    missing or damaged, the parts do not fit together.
    """
    _check(out, parts, card, overwrite)
    _check_clip(parts)
    kind = torch.float16 if dtype == "float16" else torch.float32
    with replacing(out) as temporary:
        for part in (name for name in PARTS if name in parts):
            folder = temporary / part
            folder.mkdir()
            if part == "clip":
                _copy_clip(parts[part], folder, kind)
            else:
                _copy_part(parts[part], folder, _KINDS[part], kind)
        if PCA in parts:  # stays float32: half precision would bend the axes
            PrincipalComponents.load(parts[PCA]).save(temporary / PCA)
        named = {name: name for name in (*PARTS, PCA) if name in parts}
        body = {"example_prompts": [], **(details or {})}
        write_json(temporary / MANIFEST, {"format": FORMAT, "parts": named, **body})
        if card is not None:
            shutil.copyfile(card, temporary / "README.md")
        try:
            UnCLIP.from_pretrained(temporary, device="cpu")
        except UnclipError as error:
            raise type(error)(str(error).replace(str(temporary), str(out))) from error


def merge(
    out: Path,
    model: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    name: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    overwrite: bool = False,
) -> None:
    """Write the bundle `model` with low-rank adapters merged into its weights to the folder `out`.

    Adapters are given as UnCLIP.from_pretrained takes them. Raises UnclipError: as `assemble`, and no adapter, or one
    for another network; UsageError: none given.
    """
    from decoder import DecoderStage
    from prior import PriorStage
    from upsamplers import UpsamplerStage

    if not adapters:
        raise UsageError("no adapter given; name the folder that a run with train.lora wrote")
    folder = resolve_model(model)
    manifest = read_manifest(folder)
    parts = {part: folder / inside for part, inside in manifest["parts"].items() if part in PARTS}
    card = folder / "README.md"
    _check(out, parts, None, overwrite)
    changed = {read_adapter(parse_adapter(given)[0]).part for given in adapters}
    loaders: dict[str, Any] = {"prior": PriorStage, "decoder": DecoderStage, "upsampler": UpsamplerStage}
    chosen = [part for part in parts if _KINDS.get(part) in changed]
    stages = {part: loaders[_KINDS[part]].load(parts[part]) for part in chosen}
    by_kind = {kind: [stage for part, stage in stages.items() if _KINDS[part] == kind] for kind in loaders}
    apply_adapters(adapters, by_kind)
    details = {key: value for key, value in manifest.items() if key not in ("format", "parts")}
    details["name"] = name or out.absolute().name
    with tempfile.TemporaryDirectory() as scratch:
        for part, stage in stages.items():
            known = {"clip": read_part_json(parts[part], _KINDS[part]).get("clip")}
            save_part(Path(scratch) / part, _KINDS[part], stage.config, stage.network.state_dict(), known)
            statistics = read_statistics(parts[part])
            if statistics is not None:  # close to those of the merged weights; `unclip statistics` measures them anew
                save_statistics(Path(scratch) / part, statistics)
            parts[part] = Path(scratch) / part
        assemble(out, parts, details, card if card.is_file() else None, dtype, overwrite)


def _check(out: Path, parts: Mapping[str, Path], card: Path | None, overwrite: bool) -> None:
    """Whatever can be found wrong before a byte is copied."""
    known = (*PARTS, PCA)
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise UsageError(f"unknown part {unknown[0]!r}; known: {', '.join(known)}")
    for part in ("clip", "decoder"):
        if part not in parts:
            raise UsageError(f"a bundle needs a {part}; given: {', '.join(parts) or 'nothing'}")
    try:
        out.is_symlink()
    except OSError as error:  # a name too long
        raise UnclipError(f"cannot write {out}: {error.strerror or error}") from error
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UnclipError(f"{out} exists and is not a folder; name another")
    if out.exists() and not overwrite:
        raise UnclipError(f"{out} exists; pass --overwrite to replace it, or name another folder")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UnclipError(
            f"{out} is not a bundle ({MANIFEST} is missing), so it is not replaced; name another folder"
        )
    if card is not None and not card.is_file():
        raise UnclipError(f"there is no model card at {card}")


def _check_clip(parts: Mapping[str, Path]) -> None:
    """The stages that were trained on a CLIP's embeddings remember which one it was."""
    own = identify(str(parts["clip"]))
    for part in ("prior", "decoder"):
        known = read_part_json(parts[part], part).get("clip") if part in parts else None
        if known and (difference := same_clip(known, own)):
            raise UnclipError(
                f"the {part} in {parts[part]} was trained with another CLIP than the one in {parts['clip']}: "
                f"{difference}; name the CLIP of its run"
            )


def _copy_part(source: Path, target: Path, kind: str, dtype: torch.dtype) -> None:
    body = read_part_json(source, kind)
    save_weights(target, _converted(load_weights(source), dtype, source))
    write_json(target / "config.json", carry(body, source, target))
    statistics = read_statistics(source)
    if statistics is not None:
        save_statistics(target, statistics)


def _copy_clip(source: Path, target: Path, dtype: torch.dtype) -> None:
    """open_clip reads one weights file, so this part alone is never split."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if not (source / CONFIG_FILE).is_file():
        raise UnclipError(f"{source} is not an open_clip model: {CONFIG_FILE} is missing (found: {contents(source)})")
    weights = next((source / name for name in _CLIP_WEIGHTS if (source / name).is_file()), None)
    if weights is None:
        raise UnclipError(
            f"{source} has no weights that are read here; expected one of {', '.join(_CLIP_WEIGHTS)}"
        )
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UnclipError(f"{weights} is damaged or not a safetensors file: {error}") from error
    file = target / _CLIP_WEIGHTS[0]
    save_file(_converted(state, dtype, source), file, metadata={"format": "pt"})
    file.chmod(0o644)
    for extra in sorted(source.iterdir()):
        if extra.is_file() and extra.suffix in _CLIP_EXTRAS and not extra.name.endswith(".index.json"):
            shutil.copyfile(extra, target / extra.name)


def _converted(state: Mapping[str, Tensor], dtype: torch.dtype, source: Path) -> dict[str, Tensor]:
    """Floating tensors as `dtype`. UnclipError when a value is not finite or too large for it."""
    converted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    for key, value in converted.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UnclipError(
                f"{key} of {source} holds NaN, infinity or values too large for "
                f"{str(dtype).removeprefix('torch.')}"
            )
    return {key: value.contiguous() for key, value in converted.items()}
