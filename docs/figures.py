"""Draw the documentation's figures from the code and the bundled model: `python docs/figures.py [--only NAME …]`.

All seeds are fixed. `personalise` trains first, for some minutes, unless RUNS in the environment names the runs of
examples/personalise/train.sh; those called evaluation take hours, and data that the environment names: where it does
not, they stay as they are, with a note, and the exit code is 1 if they were asked for. Not drawn here are
synthetic.png, the last pictures of examples/synthetic, and watching.png, `unclip plot` of the tutorial's prior.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import figures_editing
import figures_evaluation
import figures_examples
import figures_manipulations
import figures_probing
import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.config import DiffusionConfig
from unclip.diffusion import (
    SAMPLERS,
    GaussianDiffusion,
    Prediction,
    ddim,
    measure_epsilon_statistics,
    timesteps_from,
)
from unclip.diffusion.variance import analytic_variance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MEANS, DEVIATION = (-1.0, 1.0), 0.25
"""The mixture of two Gaussians whose denoiser is known exactly."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--only", choices=FIGURES, nargs="+", default=[])
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    undrawn = []
    for name in arguments.only or FIGURES:
        file = out / f"{name}.png"
        try:
            picture = FIGURES[name]()
        except figures_evaluation.NotNamed as error:
            undrawn.append(name)
            print(f"left as it is: {name} {error}", file=sys.stderr)
            continue
        if picture is None:
            buffer = io.BytesIO()
            plt.savefig(buffer, dpi=90, bbox_inches="tight")
            plt.close("all")
            picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture.save(file, optimize=True)
        print(file)
    if arguments.only and undrawn:
        raise SystemExit(1)


def schedules() -> None:
    """log-SNR of every schedule over t."""
    plt.figure(figsize=(6.5, 3.8))
    for name in ("linear", "cosine", "quadratic", "sigmoid"):
        bar = GaussianDiffusion(DiffusionConfig(schedule=name)).alphas_cumprod
        plt.plot(np.log(bar / (1 - bar)), label=name)
    zero = DiffusionConfig(schedule="linear", prediction="v", zero_terminal_snr=True)
    bar = GaussianDiffusion(zero).alphas_cumprod[:-1]
    plt.plot(np.log(bar / (1 - bar)), "--", label="linear, zero terminal SNR")
    plt.xlabel("t")
    plt.ylabel("log SNR")
    plt.ylim(-16, 11)
    plt.grid(alpha=0.3)
    plt.legend()


def exact_denoiser(process: GaussianDiffusion) -> Callable[[Tensor, Tensor], Prediction]:
    """E[x_0 | x_t] of the mixture: each component's posterior mean, weighted by its responsibility."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        bar = torch.from_numpy(process.alphas_cumprod)[t].view(-1, *[1] * (x_t.ndim - 1))
        variance = bar * DEVIATION**2 + 1 - bar
        means = torch.tensor(MEANS, dtype=x_t.dtype)
        gap = x_t[..., None] - bar.sqrt()[..., None] * means
        weight = torch.softmax(-(gap**2) / (2 * variance[..., None]), dim=-1)
        posterior = means + bar.sqrt()[..., None] * DEVIATION**2 / variance[..., None] * gap
        x_start = (weight * posterior).sum(-1)
        return Prediction(x_start, (x_t - bar.sqrt() * x_start) / (1 - bar).sqrt(), None)

    return denoise


def samplers() -> None:
    """Deterministic samplers: distance to DDIM in 1,000 steps. Those that draw noise: error of the variance."""
    process = GaussianDiffusion(DiffusionConfig())
    denoiser = exact_denoiser(process)
    start = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = ddim(denoiser, start, process.steps(range(1000)), torch.randn_like)
    counts = (3, 5, 8, 12, 20, 35, 60, 100, 200)
    left, right = plt.subplots(1, 2, figsize=(10, 3.8))[1]
    for name in ("ddim", "plms", "dpmpp_2m", "unipc"):
        error = []
        for count in counts:
            result = SAMPLERS[name](denoiser, start, process.steps(timesteps_from(count, 1000)), torch.randn_like)
            error.append((result - truth).square().mean().sqrt().item())
        left.loglog(counts, error, "o-", ms=3, label=name)
    left.set_title("distance to DDIM in 1,000 steps")
    data = mixture(20_000)
    batches = [(denoiser, data)]
    generator = torch.Generator().manual_seed(1)
    process.use_statistics(measure_epsilon_statistics(batches, process, range(0, 1000, 9), generator))
    wanted = DEVIATION**2 + 1
    for name in ("ddpm", "ddim", "analytic"):
        error = []
        for count in counts:
            torch.manual_seed(2)
            options = {"eta": 1.0}
            steps = process.steps(timesteps_from(count, 1000))
            result = SAMPLERS[name](denoiser, start, steps, torch.randn_like, **options)
            error.append(abs(result.var().item() - wanted) / wanted)
        right.loglog(counts, error, "o-", ms=3, label=f"{name}, η = 1")
    right.set_title("relative error of the variance (4,000 samples)")
    for axes in (left, right):
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def mixture(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    which = torch.randint(0, 2, (count, 1), generator=generator)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return torch.tensor(MEANS, dtype=torch.float64)[which] + DEVIATION * noise


def variances() -> None:
    """Standard deviation of a step's noise, 25 steps: β, β̃, and the optimum between and below them."""
    process = GaussianDiffusion(DiffusionConfig())
    generator = torch.Generator().manual_seed(1)
    batches = [(exact_denoiser(process), mixture(20_000))]
    process.use_statistics(measure_epsilon_statistics(batches, process, range(0, 1000, 9), generator))
    steps = process.steps(timesteps_from(25, 1000))[1:-1]
    t = [step.t for step in steps]
    plt.figure(figsize=(6.5, 3.8))
    plt.plot(t, [math.sqrt(step.beta) for step in steps], label="sqrt(β), fixed large")
    plt.plot(t, [math.sqrt(step.posterior_variance) for step in steps], label="sqrt(β̃), fixed small")
    plt.plot(t, [math.sqrt(analytic_variance(step)) for step in steps], "--", label="σ*, analytic")
    plt.xlabel("t of the step (25 steps)")
    plt.ylabel("standard deviation")
    plt.grid(alpha=0.3)
    plt.legend()


def trajectory() -> None:
    """x̂_0 of the bundled decoder at each of eight steps, one row a sampler, from the same noise and embedding."""
    from unclip import UnCLIP

    model = UnCLIP.from_pretrained(size=64)
    stage = model.decoder
    if stage is None:
        raise SystemExit("the bundled model has no decoder")
    embedding = model.predict_embedding("strawberry")
    names, count = ("ddim", "plms", "dpmpp_2m", "unipc"), 8
    rows = plt.subplots(len(names), count, figsize=(count * 1.1, len(names) * 1.2))[1]
    for name, row in zip(names, rows, strict=True):
        seen: list[Tensor] = []
        stage.sample(embedding, [0], sampler=name, steps=count, callback=lambda _n, _m, x, seen=seen: seen.append(x))
        for axes, x_start in zip(row, seen, strict=True):
            axes.imshow(((x_start[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).float().numpy())
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(name)


def gallery() -> Image.Image:
    """Prompts at 1024 px, seed 0, each shown at a quarter of its size."""
    from unclip import UnCLIP
    from unclip.data import make_grid

    model = UnCLIP.from_pretrained()
    pictures = [image for prompt in GALLERY for image in model.sample(prompt, seed=0)]
    return make_grid([image.resize((256, 256), Image.Resampling.LANCZOS) for image in pictures], columns=6)


GALLERY = (
    "pizza", "strawberry", "volcano", "penguin", "sailboat", "red apple",
    "fox", "camera", "sunflower", "rocket", "basketball", "owl",
    "two frogs side by side on a pink background", "a house left of a balloon on a blue background",
    "a red apple left of a green apple on a white background", "three strawberries in a row on a grey background",
    "a cactus right of a sunflower on a blue background", "a crown above a cactus on a pink background",
)  # fmt: skip

FIGURES: dict[str, Callable[[], Image.Image | None]] = {
    "gallery": gallery,
    "schedules": schedules,
    "samplers": samplers,
    "variances": variances,
    "trajectory": trajectory,
    **figures_editing.FIGURES,
    **figures_examples.FIGURES,
    **figures_manipulations.FIGURES,
    **figures_probing.FIGURES,
    **figures_evaluation.FIGURES,
}

if __name__ == "__main__":
    main()
