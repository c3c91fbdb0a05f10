"""Training losses, each a sample and by name, and the variational bound in bits a dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from unclip.errors import UsageError

if TYPE_CHECKING:
    from unclip.diffusion.guidance import Denoiser
    from unclip.diffusion.process import GaussianDiffusion, Prediction
    from unclip.diffusion.samplers import Noise

Likelihood = Literal["discrete", "continuous"]


def training_losses(
    process: GaussianDiffusion, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Losses of a network's `output` at (x_t, t), each (B,): `mse` (L_simple), `loss`, with a learned variance `vb`;
    beside them `quartile` (B,) int64, the quarter 0 to 3 of the process that t lies in.

    `loss` is the squared error, weighted where the configuration says so, plus with a learned variance λ·T·vb, which
    estimates λ·L_vlb; the mean is detached in it (L_hybrid; Improved DDPM, eq. 16 and §3.1). `vb` is the term of the
    drawn t in bits a dimension.
    """
    prediction, fraction = process.split_output(output, x_start.shape[1])
    mse = _mean_flat((prediction - process.target(x_start, t, noise)) ** 2)
    weighted = mse * loss_weight(process, t, mse)
    quartile = 4 * t // process.timesteps
    if fraction is None:
        return {"mse": mse, "loss": weighted, "quartile": quartile}
    frozen = process.to_prediction(torch.cat([prediction.detach(), 2 * fraction - 1], dim=1), x_t, t)
    vb = variational_bound(process, frozen, x_start, x_t, t)
    loss = weighted + process.config.vb_weight * process.timesteps * vb
    return {"mse": mse, "vb": vb, "loss": loss, "quartile": quartile}


def loss_weight(process: GaussianDiffusion, t: Tensor, like: Tensor) -> Tensor:
    """The weight of the squared error at t, (B,): 1, or min-SNR-γ's (Hang et al. 2023, §3.4).

    In x_0 that is min(SNR, γ). A squared error in ε is SNR times that in x_0, one in v is SNR + 1 times; the weights
    are divided by as much.
    """
    if process.config.loss_weighting == "none":
        return torch.ones_like(like)
    snr = process.table("snr", t, like)
    clipped = snr.clamp_max(process.config.min_snr_gamma)
    if process.config.prediction == "epsilon":
        return clipped / snr
    return clipped if process.config.prediction == "x_start" else clipped / (snr + 1)


def variational_bound(
    process: GaussianDiffusion,
    prediction: Prediction,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    likelihood: Likelihood = "discrete",
) -> Tensor:
    """The bound's term at t in bits a dimension, (B,): L_{t} = KL(q(x_{t−1}|x_t, x_0) || p(x_{t−1}|x_t)), or at t = 0
    the negative log-likelihood of x_0 (DDPM, eq. 5; Improved DDPM, eq. 4 to 7).

    discrete: x_0 are 8-bit values scaled to [-1, 1], x̂_0 is clamped to them, and t = 0 counts the probability of a
    bin 2/255 wide. continuous: t = 0 counts a density, and x̂_0 is taken as it is.
    """
    coef_start = process.table("posterior_coef_x_start", t, x_t)
    coef_t = process.table("posterior_coef_x_t", t, x_t)
    true_mean = coef_start * x_start + coef_t * x_t
    guess = prediction.x_start.clamp(-1, 1) if likelihood == "discrete" else prediction.x_start
    mean = coef_start * guess + coef_t * x_t
    true_log_variance = process.table("posterior_log_variance", t, x_t)
    log_beta = process.table("log_betas", t, x_t)
    if prediction.variance_fraction is not None:
        fraction = prediction.variance_fraction
        log_variance = fraction * log_beta + (1 - fraction) * true_log_variance
    else:
        large = process.config.variance == "fixed_large"
        log_variance = (log_beta if large else true_log_variance).expand_as(mean)
    # KL between two diagonal Gaussians.
    kl = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        - 1
    )
    if likelihood == "discrete":
        nll = -_discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
    else:
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x_start - mean) ** 2 * torch.exp(-log_variance))
    first = (t == 0).view(-1, *[1] * (x_t.ndim - 1))
    return _mean_flat(torch.where(first, nll, kl)) / math.log(2)


def prior_bound(process: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """L_T = KL(q(x_T|x_0) || N(0, I)) in bits a dimension, (B,) (Improved DDPM, eq. 7)."""
    alpha_bar = float(process.alphas_cumprod[-1])
    kl = 0.5 * (alpha_bar * x_start**2 - alpha_bar - math.log1p(-alpha_bar))
    return _mean_flat(kl) / math.log(2)


class BoundTerms(NamedTuple):
    """The variational bound, taken apart; all in bits a dimension except `mse`."""

    total: Tensor
    """(B,): prior + Σ terms, an upper bound of −log2 p(x_0)/d."""
    prior: Tensor
    """(B,): L_T."""
    terms: Tensor
    """(B, T): L_{t} by timestep; column 0 is the likelihood of x_0."""
    mse: Tensor
    """(B, T): mean squared error of ε̂ by timestep."""


def negative_log_likelihood(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    x_start: Tensor,
    noise: Noise,
    *,
    likelihood: Likelihood = "discrete",
    timesteps: Sequence[int] | None = None,
) -> BoundTerms:
    """The whole variational bound of x_0 (B, …) in bits a dimension, one noise a timestep (Improved DDPM, §2.1).

    `discrete` counts the probability of 8-bit values in [-1, 1] (a bin is 2/255 wide), `continuous` a density; for a
    smooth density the first is the second plus log2(255/2). The denoiser runs without guidance. With `timesteps`, a
    subset, the sum over t is estimated from those: 0 is always taken, the others stand for all from 1 on, and the
    columns of `terms` and `mse` are theirs, ascending.
    Raises UsageError: a timestep outside 0 … T−1, or none above 0.
    """
    kept = list(range(process.timesteps)) if timesteps is None else sorted({0, *timesteps})
    if not 0 <= kept[0] <= kept[-1] < process.timesteps or len(kept) < 2:
        raise UsageError(f"the bound at timesteps {kept}; expected some of 1 to {process.timesteps - 1}")
    terms, errors = [], []
    for t in kept:
        drawn = noise(x_start)
        steps = torch.full((len(x_start),), t, dtype=torch.long, device=x_start.device)
        x_t = process.q_sample(x_start, steps, drawn)
        prediction = denoiser(x_t, steps)
        terms.append(variational_bound(process, prediction, x_start, x_t, steps, likelihood=likelihood))
        errors.append(_mean_flat((prediction.epsilon - drawn) ** 2))
    prior, table = prior_bound(process, x_start), torch.stack(terms, dim=1)
    share = (process.timesteps - 1) / (len(kept) - 1)
    total = prior + table[:, 0] + share * table[:, 1:].sum(dim=1)
    return BoundTerms(total, prior, table, torch.stack(errors, dim=1))


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
