"""The digits' CLIP, prior and decoder by the project's own training code, as train_clip.py and the others run it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.digits_data import SIZE
from unclip.config import parse_config

_OPTIMIZER = {"eps": 1e-8, "weight_decay": 0.02, "warmup_steps": 30, "schedule": "cosine"}
RECIPES: dict[str, dict[str, Any]] = {
    "clip": {
        "model": {
            "embed_dim": 64, "image_size": SIZE, "patch_size": 4, "context_length": 12, "vocabulary_merges": 4000,
            "vision": {"width": 64, "layers": 3, "heads": 2}, "text": {"width": 64, "layers": 2, "heads": 2},
        },
        # Only ten things are ever said, so that a loss of pairs alone would let every seven be the same vector.
        "spread_weight": 0.3,
        "train": {"steps": 160, "batch_size": 96, "ema_decay": 0.95, "optimizer": {**_OPTIMIZER, "lr": 2e-3}},
    },
    "prior": {
        "clip_cache": 8192,
        "model": {
            "width": 128, "depth": 3, "heads": 4, "drop_text": 0.1, "steps": 16, "guidance": 1.0, "candidates": 2,
        },
        "train": {"steps": 300, "batch_size": 64, "ema_decay": 0.98, "optimizer": {**_OPTIMIZER, "lr": 1e-3}},
    },
    "decoder": {
        "clip_cache": 8192,
        "model": {
            "context_dim": 64, "image_tokens": 4, "spatial_seed": True, "embedding_noise": 0.1,
            "drop_embedding": 0.1, "drop_text": 0.5,
            # Folding 2×2 pixels gives the network the edge at which the digits were stored.
            "unet": {
                "image_size": SIZE, "patch_size": 2, "model_channels": 32, "channel_mult": [1, 2],
                "num_res_blocks": 2, "attention_resolutions": [4], "head_channels": 32,
            },
            "diffusion": {"prediction": "x_start", "timestep_bias": 1.5},
            "steps": 20, "sampler": "ddim", "guidance": 1.0,
        },
        "train": {"steps": 700, "batch_size": 64, "ema_decay": 0.98, "optimizer": {**_OPTIMIZER, "lr": 2e-3}},
    },
}  # fmt: skip
STAGES = tuple(RECIPES)


@dataclass(frozen=True)
class Spent:
    """What a stage's training took, from its call to its exported model: wall and processor seconds of all threads."""

    wall: float
    cpu: float


class Stopwatch:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Spent:
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else value
    return result


def train(folder: Path, data: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Spent]:
    """Train the three stages one after the other on the digits in `data`; what each took. A stage whose run has ended
    is not trained again.
    """
    from decoder.config import DecoderRunConfig
    from decoder.train import run as run_decoder
    from prior.config import PriorRunConfig
    from prior.train import run as run_prior
    from unclip.training import current
    from unclip.training.clip import run as run_clip
    from unclip.training.clip_config import ClipRunConfig

    kinds: dict[str, tuple[Any, Any]] = {
        "clip": (ClipRunConfig, run_clip),
        "prior": (PriorRunConfig, run_prior),
        "decoder": (DecoderRunConfig, run_decoder),
    }
    spent = {}
    for stage, recipe in RECIPES.items():
        run_dir, told = folder / stage, folder / f"{stage}.json"
        if told.is_file():
            spent[stage] = Spent(**json.loads(told.read_text()))
            continue
        config_type, run = kinds[stage]
        fixed: dict[str, Any] = {
            "data": {"source": str(data), "image_size": SIZE, "cache": True},
            "train": {
                "run_dir": str(run_dir), "seed": 0, "log_every": 50, "checkpoint_every": 1_000_000, "sample_every": 0,
                "peak_tflops": 1.0, "wandb": {"mode": "disabled"},
            },
        }  # fmt: skip
        if stage != "clip":
            fixed["clip"] = str(folder / "clip" / "model")
        body = merged(merged(recipe, fixed), (changes or {}).get(stage, {}))
        watch = Stopwatch()
        run(parse_config(config_type, body, origin=f"the digits' {stage}"), current())
        spent[stage] = watch.read()
        told.write_text(json.dumps(vars(spent[stage])) + "\n")
        print(f"{stage}: {spent[stage].wall:.0f} s, of a processor {spent[stage].cpu:.0f} s", flush=True)
    return spent


def bundle(folder: Path) -> Path:
    """The three parts as one model folder."""
    from unclip.assemble import assemble

    out = folder / "model"
    parts = {stage: folder / stage / "model" for stage in STAGES}
    assemble(out, parts, {"name": "digits"}, dtype="float32", overwrite=True)
    return out


def draw(model: Path, prompts: list[str], seed: int, batch: int = 120) -> Tensor:
    """A picture a prompt, (B, 3, SIZE, SIZE) in [-1, 1], with the model's own settings."""
    import torch

    from unclip.pipeline import UnCLIP

    system = UnCLIP.from_pretrained(model, device="cpu")
    drawn = [
        system.sample(prompts[i : i + batch], seed=[seed + j for j in range(i, min(i + batch, len(prompts)))],
                      output="tensor")
        for i in range(0, len(prompts), batch)
    ]  # fmt: skip
    return torch.cat(drawn)
