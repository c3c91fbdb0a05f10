"""Kandinsky 2.1's and 2.2's prior pipelines (diffusers folders) -> our diffusion prior, on their own CLIP's space.

Both are a `PriorTransformer`, 2.1 on ViT-L/14 (768), 2.2 on ViT-bigG/14 (1280), whose embeddings have raw length and
whose null is the CLIP's features of "". Their decoders are latent U-Nets of another kind; what takes these
embeddings here is a decoder trained on the same CLIP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from prior import PriorConfig
from unclip.bundle import check_part_free, read_json, save_part
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.errors import UnclipError
from unclip.interop.folders import read_prior_model
from unclip.interop.prior import prior_from_diffusers

PIPELINES = ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
CLIPS = {768: "ViT-L-14/openai", 1280: "ViT-bigG-14/laion2b_s39b_b160k"}
"""The CLIP of each width, as FrozenCLIP.load takes it."""


def convert_kandinsky(folder: Path, out: Path, clip: str | None = None, overwrite: bool = False) -> None:
    """Write the prior to the folder `out`, which `unclip bundle` takes. With `clip`, as FrozenCLIP.load takes
    it, the features of "" that guidance needs are stored with it.

    Raises UnclipError: as `read_kandinsky_prior`; `out` is something else, or exists and `overwrite` is not set.
    """
    check_part_free(out, "prior", overwrite)
    null = None if clip is None else FrozenCLIP.load(clip).encode_text([""])
    config, state = read_kandinsky_prior(folder, null)
    save_part(out, "prior", config, state)


def is_kandinsky_prior(folder: Path) -> bool:
    """Whether a folder is a prior pipeline of Kandinsky 2.1 or 2.2. Never raises."""
    try:
        return read_json(folder / "model_index.json").get("_class_name") in PIPELINES
    except UnclipError:
        return False


def read_kandinsky_prior(
    folder: Path, null: TextFeatures | None = None, **sampling: Any
) -> tuple[PriorConfig, dict[str, Tensor]]:
    """The pipeline's folder -> configuration and state dict of `Prior`, as `prior_from_diffusers`; how it is clamped
    comes from its scheduler.

    Raises UnclipError: no such pipeline, a scheduler that predicts something other than the embedding, a text encoder
    whose embeddings are not as wide as the prior's.
    """
    if not is_kandinsky_prior(folder):
        raise UnclipError(
            f"{folder} is no prior pipeline of Kandinsky; its model_index.json names none of {PIPELINES[:2]}"
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    expected = {"prediction_type": "sample", "variance_type": "fixed_small_log", "num_train_timesteps": 1000}
    for name, value in expected.items():
        if scheduler.get(name, value) != value:
            raise UnclipError(f"the scheduler of {folder} has {name} {scheduler[name]!r}; expected {value!r}")
    limit = scheduler.get("clip_sample_range", 1.0) if scheduler.get("clip_sample", True) else None
    state, config = read_prior_model(folder)
    encoder = folder / "text_encoder" / "config.json"
    width = config.get("embedding_dim", 768)
    if encoder.is_file():
        projected = read_json(encoder).get("projection_dim", width)
        if projected != width:
            raise UnclipError(
                f"{folder} is no whole pipeline: its CLIP makes {projected} dimensions, its prior {width}"
            )
    return prior_from_diffusers(state, config, null, **{"clip_range": limit, **sampling})
