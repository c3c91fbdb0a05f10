"""The loss of 50 steps of each stage, with fixed seeds, against what is stored in data/loss_curves.json.

A change of a network, an objective, a schedule or the loop that moves a curve shows here. Where it is meant to,
`python tests/test_loss_curves.py` writes the file anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent / "data" / "loss_curves.json"
STEPS = 50
TOLERANCE = 0.005
"""Relative. Without a processor's vector instructions the curves moved by 0.0003 at most."""

UNET = {"image_size": 8, "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "head_channels": 8}
TOWER = {"width": 16, "layers": 1, "heads": 2}
BODIES: dict[str, dict[str, Any]] = {
    "clip": {
        "model": {
            "embed_dim": 16, "image_size": 16, "patch_size": 8, "context_length": 12, "vocabulary_merges": 100,
            "vision": TOWER, "text": TOWER,
        }
    },
    "prior": {"model": {"width": 16, "depth": 1, "heads": 2}, "statistics_batches": 1, "clip_cache": 64},
    "prior_autoregressive": {
        "model": {
            "kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "buckets": 16, "largest_error": 0.3,
            "text_encoder": {"width": 16, "depth": 1, "heads": 2},
        },
        "statistics_batches": 1, "clip_cache": 64,
    },
    "decoder": {"model": {"unet": UNET, "context_dim": 8}, "clip_cache": 64},
    "upsampler": {"model": {"unet": UNET, "low_size": 4, "high_size": 8, "steps": 2}},
}  # fmt: skip


def curve(stage: str, folder: Path, clip: Path) -> list[float]:
    """Train a tiny model of a stage in this process -> its losses."""
    from decoder.config import DecoderRunConfig
    from decoder.train import run as run_decoder
    from prior.config import PriorRunConfig
    from prior.train import run as run_prior
    from unclip.config import parse_config
    from unclip.training import current
    from unclip.training.clip import run as run_clip
    from unclip.training.clip_config import ClipRunConfig
    from upsamplers.config import UpsamplerRunConfig
    from upsamplers.train import run as run_upsampler

    cls, run = {
        "clip": (ClipRunConfig, run_clip),
        "prior": (PriorRunConfig, run_prior),
        "prior_autoregressive": (PriorRunConfig, run_prior),
        "decoder": (DecoderRunConfig, run_decoder),
        "upsampler": (UpsamplerRunConfig, run_upsampler),
    }[stage]
    size = 8 if stage in ("decoder", "upsampler") else 16
    train = {"run_dir": str(folder / stage), "steps": STEPS, "batch_size": 8, "log_every": 1, "peak_tflops": 1.0}
    train |= {"checkpoint_every": 1000, "wandb": {"mode": "disabled"}, "optimizer": {"lr": 3e-3, "warmup_steps": 5}}
    body: dict[str, Any] = {"data": {"source": "synthetic", "image_size": size, "synthetic": {"size": 64}}}
    body |= {"train": train, **BODIES[stage]}
    if stage.startswith(("prior", "decoder")):
        body["clip"] = str(clip)
    run(parse_config(cls, body), current())  # type: ignore[operator, type-var]
    rows = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return [round(row["loss"], 5) for row in rows]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """In a process of its own, on one thread: the order of sums is part of the curve."""
    folder = tmp_path_factory.mktemp("curves")
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    environment |= {"HF_HOME": str(folder / "cache")}
    command = [sys.executable, __file__, str(folder / "curves.json")]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "curves.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", list(BODIES))
def test_loss_curve(stage: str, curves: dict[str, list[float]]) -> None:
    stored = json.loads(FILE.read_text())[stage]
    assert len(stored) == STEPS == len(curves[stage])
    assert curves[stage] == pytest.approx(stored, rel=TOLERANCE)
    assert sum(stored[-10:]) < sum(stored[:10])  # it learns


def main() -> None:
    """Write all curves into a file, by default the stored one."""
    from conftest import make_clip

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    with tempfile.TemporaryDirectory() as place:
        clip = make_clip(Path(place) / "clip")
        told = {stage: curve(stage, Path(place), clip) for stage in BODIES}
    rows = (f' "{stage}": {json.dumps(values)}' for stage, values in told.items())
    out.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
