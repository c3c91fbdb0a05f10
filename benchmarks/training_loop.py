"""Throughput of the training loop beside a bare PyTorch loop with the same network, batch, loss and optimizer.

`python -m benchmarks training-loop` trains a small decoder-like U-Net on random images, or with --stage prior a
diffusion prior on random embeddings, in turns of some steps each in one process, and tells the ratio of the times. The
bare loop has AdamW, clipping and a schedule and nothing else; ours has DeepSpeed's engine, the moving average, guards,
metrics and its tracker, without checkpoints. Where dalle2-pytorch is installed, the prior's turns are also its
DiffusionPriorTrainer's, with a prior of as many parameters.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peer_dalle2
from benchmarks.contest import parameters_of
from benchmarks.shapes import SIZES, captions, rand
from benchmarks.timing import Spread, in_turns, paired_ratio
from prior import Prior, PriorConfig
from prior.objective import prior_loss
from unclip.config import Config, DiffusionConfig, OptimizerConfig, TrainConfig, WandbConfig, parse_config
from unclip.data import Tally
from unclip.diffusion import GaussianDiffusion
from unclip.nn import UNet, UNetConfig
from unclip.training.distributed import current
from unclip.training.engine import learning_rate_factor
from unclip.training.guard import Signals
from unclip.training.loop import _Run

_STEPS = 1_000_000

Loss = Callable[[Any, Tensor, torch.Generator], Tensor]
"""Of the network as it is called, a batch (B, …) and randomness: (B,)."""


class _RunConfig(Config):
    train: TrainConfig


class _Images:
    """One batch, again and again: data loading is not what is compared."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.tally = image, Tally()

    def __next__(self) -> dict[str, Any]:
        return {"image": self.image, "caption": [""] * len(self.image)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training-loop", description=__doc__)
    parser.add_argument("--stage", choices=("unet", "prior"), default="unet")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--zero", type=int, default=0, choices=range(4))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    device = current().device
    torch.manual_seed(0)
    network, image, loss, peer = (_prior if options.stage == "prior" else _unet)(options, device)
    with tempfile.TemporaryDirectory() as folder:
        works = {"bare": _bare(copy.deepcopy(network), image, loss, options)}
        with redirect_stdout(io.StringIO()):  # DeepSpeed introduces itself
            works["ours"] = _ours(network, image, loss, options, Path(folder))
        if peer is not None:
            works["dalle2-pytorch"] = peer
        seconds = in_turns(works, options.rounds, device, warm_up=2)
    ratio = paired_ratio(seconds["bare"], seconds["ours"])
    figures = {
        "device": str(device),
        "parameters": sum(p.numel() for p in network.parameters()),
        **{f"{name}_s_a_step": Spread.of(times).median / options.steps for name, times in seconds.items()},
        "throughput_ratio": ratio.median,
        "quartiles": [ratio.low, ratio.high],
    }
    if peer is not None:
        beside = paired_ratio(seconds["dalle2-pytorch"], seconds["ours"])
        figures["times_as_fast_as_dalle2_pytorch"] = [beside.median, beside.low, beside.high]
    print(_table(figures, seconds, options.steps))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _table(figures: dict[str, Any], seconds: dict[str, list[float]], steps: int) -> str:
    """Seconds a step of each, and how many times as fast our loop is, with quartiles."""
    told = {"bare": (figures["throughput_ratio"], *figures["quartiles"])}
    if "times_as_fast_as_dalle2_pytorch" in figures:
        told["dalle2-pytorch"] = tuple(figures["times_as_fast_as_dalle2_pytorch"])
    names = {"bare": "a bare PyTorch loop", "ours": "unclip", "dalle2-pytorch": "dalle2-pytorch's trainer"}
    lines = [
        f"{figures['parameters'] / 1e6:.1f} million parameters, {figures['device']}",
        "",
        "| | seconds a step | ours is so many times as fast |",
        "|---|---|---|",
    ]
    for name, times in seconds.items():
        ratio = "**{:.2f}** ({:.2f}–{:.2f})".format(*told[name]) if name in told else ""
        lines.append(f"| {names[name]} | {Spread.of(times).median / steps:.3g} | {ratio} |")
    return "\n".join(lines)


def _unet(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Tensor, Loss, None]:
    """A U-Net and the simple loss of epsilon."""
    shape = {"image_size": options.size, "model_channels": options.channels, "channel_mult": (1, 2, 2)}
    network, process = UNet(UNetConfig.model_validate(shape), 3, 3).to(device), GaussianDiffusion(DiffusionConfig())
    image = torch.rand(options.batch, 3, options.size, options.size, device=device) * 2 - 1

    def loss(called: Any, x_start: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.randint(1000, (len(x_start),), generator=generator, device=device)
        noise = torch.randn(x_start.shape, generator=generator, device=device)
        return (called(process.q_sample(x_start, t, noise), t) - noise).square().flatten(1).mean(1)

    return network, image, loss, None


def _prior(
    options: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Tensor, Loss, Callable[[], None] | None]:
    """A diffusion prior of the benchmark's small shape, its objective, and the peer where it is installed."""
    shape = dataclasses.replace(SIZES["small"].prior, batch=options.batch)
    sizes = {"width": shape.heads * shape.head_dim, "depth": shape.depth, "heads": shape.heads}
    dims = {"embedding_dim": shape.embedding, "token_dim": shape.embedding, "text_length": shape.tokens}
    config = parse_config(PriorConfig, {**sizes, **dims})
    prior, process = Prior(config).to(device), GaussianDiffusion(config.diffusion)
    text = captions(shape.batch, shape.tokens, shape.embedding).to(device)
    embedding = F.normalize(rand(shape.batch, shape.embedding, seed=3), dim=1).to(device)

    def loss(called: Any, truth: Tensor, generator: torch.Generator) -> Tensor:
        # A deep copy or an engine around it: the statistics of the data are alike in all.
        return prior_loss(called, prior, process, config, truth, text, generator)["loss"]

    peer = None
    if peer_dalle2.INSTALLED:
        peer = peer_dalle2.prior_trainer(shape, parameters_of(prior), text, embedding, options.steps, device)
    return prior, embedding, loss, peer


def _bare(network: nn.Module, image: Tensor, loss: Loss, options: argparse.Namespace) -> Callable[[], None]:
    generator = torch.Generator(image.device).manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    settings = OptimizerConfig(schedule="cosine")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(settings, step, _STEPS))

    def turn() -> None:
        for _ in range(options.steps):
            with torch.autocast(image.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
                mean = loss(network, image, generator).mean()
            optimizer.zero_grad()
            mean.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    return turn


def _ours(
    network: nn.Module, image: Tensor, loss: Loss, options: argparse.Namespace, folder: Path
) -> Callable[[], None]:
    here = current()
    config = TrainConfig(
        run_dir=str(folder), steps=_STEPS, batch_size=len(image), precision=options.precision,
        zero_stage=options.zero, checkpoint_every=_STEPS, peak_tflops=1.0,
        optimizer=OptimizerConfig(weight_decay=0.01, schedule="cosine"), wandb=WandbConfig(mode="disabled"),
    )  # fmt: skip

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": loss(engine, batch["image"], generator)}

    run = _Run(network, loss_fn, _Images(image), config, here)  # type: ignore[arg-type]
    run.track(_RunConfig(train=config))

    def turn() -> None:
        run.config = config.model_copy(update={"steps": run.step + options.steps, "checkpoint_every": _STEPS})
        run.save = lambda: run.step  # type: ignore[method-assign]
        with redirect_stdout(io.StringIO()):  # its progress is no figure
            run.train(Signals(), None, dict)

    return turn
