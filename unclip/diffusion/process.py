"""The Gaussian diffusion process: q, its posterior, the conversions between ε, x_0 and v, and the losses.

Timesteps are indices 0 … T−1; index t stands for step t+1 of the papers. Tables are float64; values gathered from
them are
cast to the dtype of the tensor that they meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclip.config import DiffusionConfig
from unclip.diffusion.schedule import betas


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

    @property
    def beta(self) -> float:
        """β of the kept steps follows from the kept ᾱ (Improved DDPM, §4)."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @property
    def posterior_variance(self) -> float:
        """β̃_t (DDPM, eq. 7)."""
        return (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.beta


class GaussianDiffusion:
    """A fixed forward process with T steps, and what the network predicts of it."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.timesteps = config.timesteps
        self.betas = betas(config.schedule, config.timesteps)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        # The first entry is 0; the papers' code uses the second in its logarithm.
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_coef_x_start = self.betas * np.sqrt(previous) / (1 - self.alphas_cumprod)
        self.posterior_coef_x_t = (1 - previous) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)

    @property
    def learns_variance(self) -> bool:
        return self.config.variance == "learned_range"

    # ---- the forward process -------------------------------------------------------------------------------------

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """t for a training batch, (count,) int64 on the generator's device; uniform unless `timestep_bias` says
        otherwise."""
        u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        t = (u ** (1 / self.config.timestep_bias) * self.timesteps).long()
        return t.clamp_(0, self.timesteps - 1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(ᾱ_t) x_0 + sqrt(1−ᾱ_t) ε (DDPM, eq. 4)."""
        alpha, sigma = self._alpha_sigma(t, x_start)
        return alpha * x_start + sigma * noise

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(ᾱ_t) ε − sqrt(1−ᾱ_t) x_0 (Salimans & Ho 2022, App. D)."""
        alpha, sigma = self._alpha_sigma(t, x_start)
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
        alpha, sigma = self._alpha_sigma(t, x_t)
        if self.config.prediction == "epsilon":
            return Prediction((x_t - sigma * output) / alpha, output, fraction)
        if self.config.prediction == "x_start":
            return Prediction(output, (x_t - alpha * output) / sigma, fraction)
        return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output, fraction)

    def epsilon_from(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """ε̂ that belongs to a (clipped) x̂_0."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t - alpha * x_start) / sigma

    # ---- the reverse process -------------------------------------------------------------------------------------

    def steps(self, timesteps: list[int]) -> list[Step]:
        """The reverse steps for a list of kept original timesteps, noisiest first."""
        kept = sorted(set(timesteps))
        bars = [float(self.alphas_cumprod[t]) for t in kept]
        previous = [1.0, *bars[:-1]]
        return [Step(*row) for row in zip(kept, bars, previous, strict=True)][::-1]

    # ---- losses --------------------------------------------------------------------------------------------------

    def losses(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample losses by name, each (B,): `mse` (L_simple), with a learned variance `vb` too, and `loss`.

        L_hybrid = L_simple + λ·L_vlb, the mean detached in L_vlb (Improved DDPM, eq. 16 and §3.1). `vb` is the term of
        the drawn t in bits a dimension; T times it estimates L_vlb.
        """
        prediction, fraction = self.split_output(output, x_start.shape[1])
        mse = _mean_flat((prediction - self.target(x_start, t, noise)) ** 2)
        if fraction is None:
            return {"mse": mse, "loss": mse}
        frozen = self.to_prediction(torch.cat([prediction.detach(), 2 * fraction - 1], dim=1), x_t, t)
        vb = self.variational_bound(frozen, x_start, x_t, t)
        return {"mse": mse, "vb": vb, "loss": mse + self.config.vb_weight * self.timesteps * vb}

    def variational_bound(self, prediction: Prediction, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t in bits a dimension, (B,): KL of the posteriors, or at t = 0 the decoder's
        likelihood."""
        coef_start = self._table(self.posterior_coef_x_start, t, x_t)
        coef_t = self._table(self.posterior_coef_x_t, t, x_t)
        true_mean = coef_start * x_start + coef_t * x_t
        mean = coef_start * prediction.x_start.clamp(-1, 1) + coef_t * x_t
        true_log_variance = self._table(self.posterior_log_variance, t, x_t)
        log_beta = self._table(np.log(self.betas), t, x_t)
        if prediction.variance_fraction is not None:
            fraction = prediction.variance_fraction
            log_variance = fraction * log_beta + (1 - fraction) * true_log_variance
        else:
            log_variance = (log_beta if self.config.variance == "fixed_large" else true_log_variance).expand_as(mean)
        # KL between two diagonal Gaussians.
        kl = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
            - 1
        )
        nll = -_discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
        first = (t == 0).view(-1, *[1] * (x_t.ndim - 1))
        return _mean_flat(torch.where(first, nll, kl)) / math.log(2)

    # ---- tables --------------------------------------------------------------------------------------------------

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.alphas_cumprod
        return self._table(np.sqrt(bar), t, like), self._table(np.sqrt(1 - bar), t, like)

    def _table(self, table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """Gather float64 values at t and shape them for broadcasting against `like`."""
        values = (
            torch.from_numpy(table).to(t.device)[t].to(like.dtype if like.dtype == torch.float64 else torch.float32)
        )
        return values.view(-1, *[1] * (like.ndim - 1))


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log p of 8-bit values scaled to [-1, 1] under a discretised Gaussian (DDPM, eq. 13)."""
    centred = x - mean
    inverse = torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    log_upper = upper.clamp_min(1e-12).log()
    log_not_lower = (1 - lower).clamp_min(1e-12).log()
    inner = (upper - lower).clamp_min(1e-12).log()
    return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_not_lower, inner))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
