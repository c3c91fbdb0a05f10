"""A training YAML of any stage, read and made whole: the CLIP that decides its widths is looked up, without weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict

from unclip.autoencoder import with_facts
from unclip.bundle import read_json
from unclip.clip import CONFIG_FILE, architecture, clip_folder
from unclip.config import Config, load_config, parse_config
from unclip.errors import UnclipError, UsageError

_CLASSES = {
    "clip": ("unclip.training.clip", "ClipRunConfig"),
    "prior": ("prior.config", "PriorRunConfig"),
    "decoder": ("decoder.config", "DecoderRunConfig"),
    "upsampler": ("upsamplers.config", "UpsamplerRunConfig"),
}
STAGES = tuple(_CLASSES)
_PAPER_COMPONENTS = 319 / 1024  # of the embedding's dimensions, unCLIP §2.2


@dataclass(frozen=True)
class Recipe:
    """One training run: its stage, its configuration with the CLIP's widths filled in, and what was assumed for that.

    `clip` is the open_clip `model_cfg` of the frozen CLIP that trains beside it, None where the stage uses none or
    none can be found.
    """

    stage: str
    path: Path
    config: Any  # the stage's run configuration
    clip: dict[str, Any] | None = None
    assumptions: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return self.path.stem


def read_recipe(path: str | Path, overrides: list[str] | None = None, stage: str | None = None) -> Recipe:
    """Read a training YAML with `a.b=value` overrides. Its stage is `stage`, or the name of its folder, or the one
    whose keys it has.

    Raises UsageError: no such file or stage, keys of no stage or of several, values out of range.
    """
    file = Path(path)
    found = stage or _stage_of(file, overrides or [])
    if found not in _CLASSES:
        raise UsageError(f"no stage {found!r}; known: {', '.join(STAGES)}")
    config, told = _with_start(found, load_config(_config_class(found), file, overrides))
    config, of_latents = _with_latents(config)
    told = (*told, *of_latents)
    if found in ("clip", "upsampler"):
        return Recipe(found, file, config, assumptions=told)
    recipe = _with_clip(found, file, config)
    return replace(recipe, assumptions=(*told, *recipe.assumptions))


def _stage_of(file: Path, overrides: list[str]) -> str:
    folder = file.absolute().parent.name
    for stage in STAGES:
        if folder in (stage, f"{stage}s"):
            return stage
    load_config(_Anything, file, overrides)  # whether it is YAML at all
    fitting = []
    for stage in STAGES:
        try:
            load_config(_config_class(stage), file, overrides)
        except UsageError:
            continue
        fitting.append(stage)
    if len(fitting) == 1:
        return fitting[0]
    what = "fits no stage" if not fitting else f"fits {' and '.join(fitting)}"
    raise UsageError(
        f"{file} {what}, and its folder {folder!r} names none; pass --stage {'|'.join(STAGES)}, "
        "or move it to configs/<stage>/"
    )


class _Anything(Config):
    model_config = ConfigDict(extra="allow")


def _config_class(stage: str) -> type[Config]:
    module, name = _CLASSES[stage]
    found: type[Config] = getattr(import_module(module), name)
    return found


def _with_start(stage: str, config: Any) -> tuple[Any, tuple[str, ...]]:
    """Fill in what a run takes from the weights that it starts from."""
    if getattr(config, "init_from", None) is None:
        return config, ()
    from unclip.interop import folders

    package = import_module("upsamplers.start" if stage == "upsampler" else f"{stage}.start")
    try:
        return package.with_start(config, getattr(folders, f"read_{stage}"), package.read_shape)[0], ()
    except UnclipError:
        if "model" not in config.model_fields_set:
            raise
        return config, (f"{config.init_from} is not here: what the section model leaves out has its default",)


def _with_latents(config: Any) -> tuple[Any, tuple[str, ...]]:
    """Fill in what a network in latents takes from its autoencoder, where that is a folder here; nothing is fetched."""
    latent = getattr(config.model, "latent", None)
    if latent is None:
        return config, ()
    if not Path(latent.name).expanduser().is_dir():
        return config, (
            f"the autoencoder {latent.name!r} is no local folder: its latents are taken to be {latent.channels} "
            f"channels of {latent.factor} pixels a side, and running it is not counted",
        )
    body = config.model_dump()
    body["model"]["latent"] = with_facts(latent).model_dump()
    return parse_config(type(config), body), (f"the frozen autoencoder is the one in {latent.name}",)


def _with_clip(stage: str, file: Path, config: Any) -> Recipe:
    """Fill in the widths that a training run reads from its CLIP."""
    shape, told = _find_clip(config.clip, file)
    widths: dict[str, Any] = {}
    if shape is not None:
        text = shape["text_cfg"]
        widths = {
            "embedding_dim": shape["embed_dim"],
            "token_dim": text.get("width", 512),
            "text_length": text.get("context_length", 77),
        }
    body = {**config.model.model_dump(), **widths}
    assumptions = [told]
    if shape is not None and isinstance(body.get("text"), dict) and "vocab_size" in body["text"]:
        body["text"] = {**body["text"], "vocab_size": shape["text_cfg"].get("vocab_size", 49408)}
    if isinstance(body.get("text"), dict) and body["text"].get("kind") == "t5":
        body["text"] = {**body["text"], **_t5_width(body["text"]["name"])}
    if body.get("components", 0) is None:
        body["components"] = round(_PAPER_COMPONENTS * body["embedding_dim"])
        assumptions.append(
            f"{body['components']} of {body['embedding_dim']} principal components, the paper's share; "
            "training measures how many it needs"
        )
    model = parse_config(type(config.model), body, origin=str(file))
    return Recipe(stage, file, config.model_copy(update={"model": model}), shape, tuple(assumptions))


def _t5_width(name: str) -> dict[str, int]:
    """The width of a T5-style encoder in a local folder; another's is the configuration's, and nothing is fetched."""
    from decoder.t5 import FrozenT5

    return {"width": FrozenT5.width_of(name)} if (Path(name) / "config.json").is_file() else {}


def _find_clip(name: str, file: Path) -> tuple[dict[str, Any] | None, str]:
    """The `model_cfg` of the CLIP that a run names, and in words where it was found."""
    folder = clip_folder(name)
    if (folder / CONFIG_FILE).is_file():
        shape = read_json(folder / CONFIG_FILE).get("model_cfg")
        if not isinstance(shape, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= shape.keys():
            raise UnclipError(f"{folder / CONFIG_FILE} describes no CLIP with vision_cfg and text_cfg")
        return shape, f"the frozen CLIP is the one in {folder}"
    for candidate in sorted(file.absolute().parent.parent.glob("clip/*.yaml")):
        planned = _clip_run(candidate)
        if planned is not None and Path(planned.train.run_dir) / "model" == folder:
            return planned.model.open_clip_config(), f"the frozen CLIP is the one that clip/{candidate.name} will train"
    shape = architecture(name)
    if shape is not None:
        return shape, f"the frozen CLIP is open_clip's {name}"
    return None, (
        f"the CLIP {name!r} cannot be looked up here: its widths are taken from the configuration, and running it is "
        "not counted"
    )


def _clip_run(file: Path) -> Any:
    try:
        return load_config(_config_class("clip"), file)
    except (UsageError, yaml.YAMLError, OSError):
        return None


