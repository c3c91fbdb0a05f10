"""The Gaussian diffusion process: q, its posterior, and the conversions between ε, x_0 and v.

Timesteps are indices 0 … T−1; index t stands for step t+1 of the papers. Tables are float64; values gathered from them
are cast to the dtype of the tensor that they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclip.config import DiffusionConfig, EpsilonStatistics
from unclip.diffusion.losses import training_losses, variational_bound
from unclip.diffusion.schedule import betas
from unclip.diffusion.variance import x_start_variance
from unclip.errors import UnclipError


class Prediction(NamedTuple):
    """What a denoiser says of x_t. `variance_fraction` is v in [0, 1] of Improved DDPM eq. 15, or None."""

    x_start: Tensor
    epsilon: Tensor
    variance_fraction: Tensor | None


@dataclass(frozen=True)
class Step:
    """One reverse step of a respaced process: scalars for the move from timestep t to the kept one before it."""

    t: int
    alpha_bar: float
    alpha_bar_prev: float
    middle: tuple[int, float]
    """The original timestep halfway to the kept one before it, and its ᾱ (t itself where there is none between)."""
    x_start_variance: float | None = None
    """E Cov(x_0|x_t)/d, from the statistics of Analytic-DPM where the process has them."""
    noise_limit: float | None = None
    """Largest standard deviation of this step's noise (Analytic-DPM, App. F.2)."""

    @property
    def beta(self) -> float:
        """β of the kept steps follows from the kept ᾱ (Improved DDPM, §4)."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @property
    def posterior_variance(self) -> float:
        """β̃_t (DDPM, eq. 7)."""
        return (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.beta


class GaussianDiffusion:
    """A fixed forward process with T steps, and what the network predicts of it.

    `statistics` are those of Analytic-DPM, for the sampler `analytic`; None where they were never measured.
    """

    def __init__(self, config: DiffusionConfig, statistics: EpsilonStatistics | None = None) -> None:
        self.config = config
        self.timesteps = config.timesteps
        self.betas = betas(config.schedule, config.timesteps, config.beta_range, zero_snr=config.zero_terminal_snr)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        # The first entry is 0; the papers' code uses the second in its logarithm.
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.log_betas = np.log(self.betas)
        self.posterior_coef_x_start = self.betas * np.sqrt(previous) / (1 - self.alphas_cumprod)
        self.posterior_coef_x_t = (1 - previous) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self.statistics: EpsilonStatistics | None = None
        if statistics is not None:
            self.use_statistics(statistics)

    @property
    def learns_variance(self) -> bool:
        return self.config.variance == "learned_range"

    def use_statistics(self, statistics: EpsilonStatistics) -> None:
        """Give the process Analytic-DPM's statistics. UnclipError: measured beyond this process's timesteps."""
        if statistics.timesteps[-1] >= self.timesteps:
            raise UnclipError(
                f"the statistics were measured at timestep {statistics.timesteps[-1]}, this process has "
                f"{self.timesteps}; measure them again with `unclip statistics`"
            )
        self.statistics = statistics

    # ---- the forward process -------------------------------------------------------------------------------------

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """t for a training batch, (count,) int64 on the generator's device; uniform unless `timestep_bias` says
        otherwise."""
        u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        t = (u ** (1 / self.config.timestep_bias) * self.timesteps).long()
        return t.clamp_(0, self.timesteps - 1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(ᾱ_t) x_0 + sqrt(1−ᾱ_t) ε (DDPM, eq. 4)."""
        alpha, sigma = self.alpha_sigma(t, x_start)
        return alpha * x_start + sigma * noise

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(ᾱ_t) ε − sqrt(1−ᾱ_t) x_0 (Salimans & Ho 2022, App. D)."""
        alpha, sigma = self.alpha_sigma(t, x_start)
        return alpha * noise - sigma * x_start

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network shall put out, by `prediction`."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x_start":
            return x_start
        return self.velocity(x_start, t, noise)

    # ---- reading a network's output ------------------------------------------------------------------------------

    def split_output(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Network output (B, C or 2C, …) -> prediction (B, C, …), variance fraction in [0, 1] or None; float32."""
        output = output.float()
        if not self.learns_variance:
            return output, None
        prediction, raw = output.split(channels, dim=1)
        return prediction, (raw + 1) / 2

    def to_prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Turn a network's output at (x_t, t) into x̂_0 and ε̂, whatever it predicts."""
        output, fraction = self.split_output(output, x_t.shape[1])
        if self.config.variance == "fixed_large":  # Σ = β throughout
            fraction = torch.ones_like(output)
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.config.prediction == "epsilon":
            return Prediction((x_t - sigma * output) / alpha, output, fraction)
        if self.config.prediction == "x_start":
            return Prediction(output, (x_t - alpha * output) / sigma, fraction)
        return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output, fraction)

    def epsilon_from(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """ε̂ that belongs to a (clipped) x̂_0."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        return (x_t - alpha * x_start) / sigma

    # ---- the reverse process -------------------------------------------------------------------------------------

    def steps(self, timesteps: Sequence[int]) -> list[Step]:
        """The reverse steps for a list of kept original timesteps, noisiest first."""
        kept = sorted(set(timesteps))
        bars = [float(self.alphas_cumprod[t]) for t in kept]
        middles = [t - (t - before) // 2 for t, before in zip(kept, [-1, *kept[:-1]], strict=True)]
        known, limit = self.statistics, None
        variances: list[float | None] = [None] * len(kept)
        if known is not None:
            gamma = np.interp(kept, known.timesteps, known.epsilon_square)
            pairs = zip(bars, gamma, strict=True)
            variances = [x_start_variance(bar, float(g), known.data_variance) for bar, g in pairs]
            limit = known.noise_limit
        rows = [
            Step(
                t,
                bar,
                previous,
                (middle, float(self.alphas_cumprod[middle])),
                variance,
                limit if number == 1 else None,  # the last step that adds noise; step 0 adds none
            )
            for number, (t, bar, previous, middle, variance) in enumerate(
                zip(kept, bars, [1.0, *bars[:-1]], middles, variances, strict=True)
            )
        ]
        return rows[::-1]

    # ---- losses --------------------------------------------------------------------------------------------------

    def losses(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample training losses by name, each (B,); see unclip.diffusion.losses.training_losses."""
        return training_losses(self, output, x_start, x_t, t, noise)

    def variational_bound(self, prediction: Prediction, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t in bits a dimension, (B,), for 8-bit values in [-1, 1]."""
        return variational_bound(self, prediction, x_start, x_t, t)

    # ---- tables --------------------------------------------------------------------------------------------------

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(ᾱ_t) and sqrt(1−ᾱ_t), shaped for broadcasting against `like`."""
        return self.table("sqrt_alphas_cumprod", t, like), self.table("sqrt_one_minus_alphas_cumprod", t, like)

    def table(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Values of the table called `name` at t (B,), shaped for broadcasting against `like` (B, …)."""
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(getattr(self, name)).to(t.device)
        values = self._on_device[key][t].to(like.dtype if like.dtype == torch.float64 else torch.float32)
        return values.view(-1, *[1] * (like.ndim - 1))
