"""Throughput of the training loop beside a bare PyTorch loop with the same network, batch, loss and optimizer.

`python -m benchmarks training-loop` trains a small decoder-like U-Net on random images, in turns of some steps each in
one process, and tells the ratio of the times. The bare loop has AdamW, clipping and a schedule and nothing else; ours
has DeepSpeed's engine, the moving average, guards, metrics and its tracker, without checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Spread, in_turns, paired_ratio
from unclip.config import Config, DiffusionConfig, OptimizerConfig, TrainConfig, WandbConfig
from unclip.data import Tally
from unclip.diffusion import GaussianDiffusion
from unclip.nn.unet import UNet, UNetConfig
from unclip.training.distributed import current
from unclip.training.engine import learning_rate_factor
from unclip.training.guard import Signals
from unclip.training.loop import _Run

_STEPS = 1_000_000


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
    shape = {"image_size": options.size, "model_channels": options.channels, "channel_mult": (1, 2, 2)}
    network = UNet(UNetConfig.model_validate(shape), 3, 3).to(device)
    image = torch.rand(options.batch, 3, options.size, options.size, device=device) * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        works = {
            "bare": _bare(copy.deepcopy(network), image, options),
            "ours": _ours(network, image, options, Path(folder)),
        }
        seconds = in_turns(works, options.rounds, device, warm_up=2)
    ratio = paired_ratio(seconds["bare"], seconds["ours"])
    figures = {
        "device": str(device),
        "parameters": sum(p.numel() for p in network.parameters()),
        **{f"{name}_s_a_step": Spread.of(times).median / options.steps for name, times in seconds.items()},
        "throughput_ratio": ratio.median,
        "quartiles": [ratio.low, ratio.high],
    }
    print(json.dumps(figures, indent=1))
    spread = f"quartiles {ratio.low:.3f} to {ratio.high:.3f}"
    print(f"our loop's throughput is {ratio.median:.3f} of a bare loop's ({spread})")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _loss(process: GaussianDiffusion, network: Any, image: Tensor, generator: torch.Generator) -> Tensor:
    """The simple loss of epsilon, (B,)."""
    t = torch.randint(1000, (len(image),), generator=generator, device=image.device)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return (network(process.q_sample(image, t, noise), t) - noise).square().flatten(1).mean(1)


def _bare(network: nn.Module, image: Tensor, options: argparse.Namespace) -> Callable[[], None]:
    process, generator = GaussianDiffusion(DiffusionConfig()), torch.Generator(image.device).manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    settings = OptimizerConfig(schedule="cosine")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(settings, step, _STEPS))

    def turn() -> None:
        for _ in range(options.steps):
            with torch.autocast(image.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
                loss = _loss(process, network, image, generator).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    return turn


def _ours(network: nn.Module, image: Tensor, options: argparse.Namespace, folder: Path) -> Callable[[], None]:
    process, here = GaussianDiffusion(DiffusionConfig()), current()
    config = TrainConfig(
        run_dir=str(folder), steps=_STEPS, batch_size=len(image), precision=options.precision,
        zero_stage=options.zero, checkpoint_every=_STEPS, peak_tflops=1.0,
        optimizer=OptimizerConfig(weight_decay=0.01, schedule="cosine"), wandb=WandbConfig(mode="disabled"),
    )  # fmt: skip

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": _loss(process, engine, batch["image"], generator)}

    run = _Run(network, loss_fn, _Images(image), config, here)  # type: ignore[arg-type]
    run.track(_RunConfig(train=config))

    def turn() -> None:
        run.config = config.model_copy(update={"steps": run.step + options.steps, "checkpoint_every": _STEPS})
        run.save = lambda: run.step  # type: ignore[method-assign]
        run.train(Signals(), None, dict)

    return turn
