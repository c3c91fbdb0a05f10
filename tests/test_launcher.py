"""Every train_*.py under the real deepspeed launcher: two processes on the CPU, one ZeRO stage each."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from decoder import Decoder, DecoderStage
from prior import AutoregressivePriorStage, Prior, PriorStage, build_network
from unclip.clip import FrozenCLIP, build_trainable
from unclip.data.synthetic import render, scene
from unclip.training.checkpoint import checkpoints
from upsamplers import Upsampler, UpsamplerStage

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).parents[1]
STEPS, RATE = 4, 1e-3
UNET = {
    "image_size": 16,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "head_channels": 8,
}
UPSAMPLER = {"unet": UNET, "low_size": 8, "high_size": 16, "steps": 2, "residual": True}
UPSAMPLER["diffusion"] = {"prediction": "x_start"}


def launch(stage: str, body: dict[str, Any], folder: Path, *overrides: str) -> Path:
    """Run `deepspeed --num_gpus 2 train_<stage>.py` to its end; returns the run folder."""
    run_dir = folder / "run"
    train = {"run_dir": str(run_dir), "steps": STEPS, "batch_size": 8, "log_every": 1, "checkpoint_every": 2}
    train |= {"optimizer": {"lr": RATE}, "ema_decay": 0.5, "wandb": {"mode": "disabled"}}
    data = {"source": "synthetic", "image_size": 16, "synthetic": {"size": 50}}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": data, "train": train, **body}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--master_port", str(port), f"train_{stage}.py"]
    places = ("HF_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    environment = {**os.environ, **{name: str(folder / "cache") for name in places}, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--config", str(recipe), *overrides],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"trained to step {STEPS}; the model is in {run_dir / 'model'}" in done.stdout
    (folder / "output.txt").write_text(done.stdout)
    return run_dir


def check_run(run_dir: Path) -> None:
    """What every run leaves: metrics of each step, both processes' share of whole checkpoints."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert all(torch.isfinite(torch.tensor(value)) for value in row.values()), row
        assert row["grad_norm"] > 0 and row["images_per_second"] > 0 and row["lr"] == RATE
    found = checkpoints(run_dir / "checkpoints")
    assert [path.name for path in found] == ["step-00000002", "step-00000004"]
    assert all(len(list(path.glob("rank-*.pt"))) == 2 for path in found)
    assert not list(run_dir.rglob(".tmp*"))


def check_weights(trained: nn.Module, state: dict[str, Tensor], rounding: float = 0.0) -> None:
    """Adam moves a weight by about the rate a step, so that each must have stayed near where it began.

    Partitions put together in another order, or averages of other tensors, would be far away.
    """
    moved = 0
    for name, parameter in trained.named_parameters():
        difference = (parameter.detach() - state[name].reshape(parameter.shape)).abs()
        allowed = 1.5 * STEPS * RATE + rounding * state[name].abs().max()
        assert float(difference.max()) < allowed, name
        moved += int((difference > 0.1 * RATE).sum())
    assert moved > 0.5 * sum(p.numel() for p in trained.parameters())


def test_clip(tmp_path: Path) -> None:
    model = {"embed_dim": 16, "image_size": 16, "context_length": 16, "vocabulary_merges": 300}
    model |= {"vision": {"width": 32, "layers": 1}, "text": {"width": 32, "layers": 1}}
    run_dir = launch("clip", {"model": model}, tmp_path, "train.zero_stage=0", "train.accumulation=2")
    check_run(run_dir)
    clip = FrozenCLIP.load(str(run_dir / "model"))
    assert clip.encode_text(["a red circle"]).embedding.shape == (1, 16)
    shape = json.loads((run_dir / "model" / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(0)
    before, _ = build_trainable(shape, run_dir / "model")
    check_weights(clip.model, before.state_dict(), rounding=1e-3)  # stored in half precision


def test_prior_with_offline_wandb(tmp_path: Path, tiny_clip_folder: Path) -> None:
    body = {"clip": str(tiny_clip_folder), "statistics_batches": 1}
    body |= {"model": {"width": 16, "depth": 1, "heads": 2}}
    run_dir = launch("prior", body, tmp_path, "train.zero_stage=1", "train.wandb.mode=offline")
    check_run(run_dir)
    logs = list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 1 and logs[0].stat().st_size > 500  # of the first process alone
    said = (tmp_path / "output.txt").read_text()
    assert said.count("train_prior.py: warning: captions longer than CLIP's 12 tokens are cut; the first of") == 1
    assert said.count("are cut;") == 1  # by one of two processes, of many captions
    stage = PriorStage.load(run_dir / "model")
    text = FrozenCLIP.load(str(tiny_clip_folder)).encode_text(["a red circle"])
    assert stage.sample(text, [0], steps=2).shape == (1, 16)
    assert 0 < float(stage.network.std.min()) < 1  # measured on the data
    torch.manual_seed(0)
    check_weights(stage.network, Prior(stage.config).state_dict())


def test_autoregressive_prior(tmp_path: Path, tiny_clip_folder: Path) -> None:
    model = {"kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "buckets": 16, "largest_error": 0.1}
    model |= {"text_encoder": {"width": 16, "depth": 1, "heads": 2}, "null_text": "clip"}
    body = {"clip": str(tiny_clip_folder), "statistics_batches": 1, "model": model}
    run_dir = launch("prior", body, tmp_path, "train.zero_stage=2")
    check_run(run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "accuracy", "cosine"} <= set(row) for row in rows)
    stage = PriorStage.load(run_dir / "model")
    assert isinstance(stage, AutoregressivePriorStage) and stage.config.components is not None
    codes = stage.network.codes
    kept = codes.variances[: stage.config.components].sum() / codes.variances.sum()
    assert 0.9 <= float(kept) < 1  # the data decided how many components there are
    assert float(stage.network.dots.shares.sum()) == pytest.approx(1)
    text = FrozenCLIP.load(str(tiny_clip_folder)).encode_text(["a red circle"])
    assert stage.sample(text, [0], guidance=2.0).shape == (1, 16)
    torch.manual_seed(0)
    check_weights(stage.network, build_network(stage.config).state_dict())


def test_decoder(tmp_path: Path, tiny_clip_folder: Path) -> None:
    unet = {**UNET, "attention_resolutions": [8]}
    body = {"clip": str(tiny_clip_folder), "model": {"unet": unet, "context_dim": 8, "spatial_seed": True}}
    run_dir = launch(
        "decoder",
        body,
        tmp_path,
        "train.zero_stage=2",
        "train.sample_every=4",
        "model.steps=2",
        "clip_cache=50",
    )
    check_run(run_dir)
    with Image.open(run_dir / "samples" / "step-00000004.png") as grid:
        assert grid.width >= 4 * 16 and grid.height >= 2 * 16  # four real pictures above four drawn ones
    stage = DecoderStage.load(run_dir / "model")
    assert stage.sample(torch.eye(16)[:2], [0, 1]).shape == (2, 3, 16, 16)
    torch.manual_seed(0)
    check_weights(stage.network, Decoder(stage.config).state_dict())


def test_upsampler(tmp_path: Path) -> None:
    run_dir = launch("upsampler", {"model": UPSAMPLER}, tmp_path, "train.zero_stage=3")
    check_upsampler(run_dir)


def test_upsampler_on_streamed_tars(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for shard in range(2):
        with tarfile.open(tars / f"{shard:05d}.tar", "w") as tar:
            for index in range(8 * shard, 8 * shard + 8):
                stream, drawn = io.BytesIO(), scene(index)
                Image.fromarray(render(drawn, 24)).save(stream, "PNG")
                for ending, content in (("png", stream.getvalue()), ("txt", drawn.caption.encode())):
                    member = tarfile.TarInfo(f"{index:05d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    data = {"source": str(tars), "image_size": 16, "streaming": True, "shuffle_buffer": 3}
    check_upsampler(launch("upsampler", {"model": UPSAMPLER, "data": data}, tmp_path))


def check_upsampler(run_dir: Path) -> None:
    check_run(run_dir)
    stage = UpsamplerStage.load(run_dir / "model")
    assert stage.sample(torch.zeros(1, 3, 8, 8), [0]).shape == (1, 3, 16, 16)
    torch.manual_seed(0)
    check_weights(stage.network, Upsampler(stage.config).state_dict())
