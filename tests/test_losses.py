"""Weights of the squared error, and the whole variational bound against the entropy of a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_diffusion import generator, normal, process
from torch import Tensor

from unclip.diffusion import Denoiser, GaussianDiffusion, Prediction, negative_log_likelihood
from unclip.diffusion.losses import loss_weight, prior_bound
from unclip.errors import UsageError

# ---- min-SNR-γ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_min_snr_weights_the_error_in_x_start_by_the_clipped_snr(prediction: str) -> None:
    """Whatever is predicted, the loss is min(SNR, γ)·||x_0 − x̂_0||² (Hang et al. 2023)."""
    ours = process(prediction=prediction, loss_weighting="min_snr", min_snr_gamma=5.0)
    t = torch.tensor([5, 100, 400, 700, 950])
    x_start, noise = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    x_t = ours.q_sample(x_start, t, noise)
    output = ours.target(x_start, t, noise) + 0.1 * normal(5, 3, 4, seed=2)
    losses = ours.losses(output, x_start, x_t, t, noise)
    error = (ours.to_prediction(output, x_t, t).x_start - x_start).square().mean(dim=(1, 2))
    snr = torch.from_numpy(ours.alphas_cumprod / (1 - ours.alphas_cumprod))[t]
    assert torch.allclose(losses["loss"].double(), snr.clamp_max(5.0) * error, rtol=2e-3)
    plain = process(prediction=prediction).losses(output, x_start, x_t, t, noise)
    assert torch.equal(losses["mse"], plain["mse"]) and torch.equal(plain["loss"], plain["mse"])


def test_min_snr_weights_in_closed_form() -> None:
    like, t = torch.zeros(3, dtype=torch.float64), torch.tensor([0, 300, 990])
    snr = {name: process(prediction=name).snr[t.numpy()] for name in ("epsilon", "x_start", "v")}["v"]
    assert snr[0] > 5 > snr[2]
    for name, divisor in (("epsilon", snr), ("x_start", np.ones(3)), ("v", snr + 1)):
        weights = loss_weight(process(prediction=name, loss_weighting="min_snr"), t, like)
        assert weights.numpy() == pytest.approx(np.minimum(snr, 5) / divisor)
    assert loss_weight(process(), t, like).tolist() == [1, 1, 1]


def test_min_snr_leaves_the_bound_as_it_is() -> None:
    options = {"prediction": "v", "variance": "learned_range"}
    ours, weighted = process(**options), process(**options, loss_weighting="min_snr")
    t, x_start, noise = torch.tensor([0, 500]), normal(2, 2, 4).clamp(-1, 1), normal(2, 2, 4, seed=1)
    output = normal(2, 4, 4, seed=2)
    found, plain = (p.losses(output, x_start, p.q_sample(x_start, t, noise), t, noise) for p in (weighted, ours))
    assert torch.equal(found["vb"], plain["vb"]) and torch.equal(found["mse"], plain["mse"])
    assert torch.allclose(plain["loss"] - found["loss"], plain["mse"] * (1 - loss_weight(weighted, t, plain["mse"])))


# ---- the whole bound ---------------------------------------------------------------------------------------

SPREAD, CENTRE = 0.15, 0.1


def exact(ours: GaussianDiffusion) -> Denoiser:
    """Mean and variance of the reverse process of N(CENTRE, SPREAD²), which is Gaussian itself: the bound is tight."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        step = int(t[0])
        bar = float(ours.alphas_cumprod[step])
        total = bar * SPREAD**2 + 1 - bar
        x_start = CENTRE + math.sqrt(bar) * SPREAD**2 / total * (x - math.sqrt(bar) * CENTRE)
        left_open = SPREAD**2 * (1 - bar) / total
        wanted = ours.posterior_variance[step] + ours.posterior_coef_x_start[step] ** 2 * left_open
        small = ours.posterior_log_variance[step]
        fraction = (math.log(wanted) - small) / (ours.log_betas[step] - small)
        epsilon = (x - math.sqrt(bar) * x_start) / math.sqrt(1 - bar)
        return Prediction(x_start, epsilon, torch.full_like(x, fraction))

    return denoise


def entropy() -> float:
    """Of N(·, SPREAD²), in bits."""
    return 0.5 * math.log2(2 * math.pi * math.e * SPREAD**2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_of_an_exact_gaussian_is_its_entropy(schedule: str) -> None:
    """Continuous: −E log2 p. Discrete: that plus log2(255/2), as 8-bit bins are 2/255 wide and SPREAD is 19 of them."""
    ours, random = process(schedule=schedule, timesteps=200), generator(1)
    x_start = CENTRE + SPREAD * torch.randn(1000, 4, generator=random).double()

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=x.dtype)

    error = 5 * math.sqrt(0.5 / 4000) / math.log(2)  # −log p has variance 1/2 nats² a value
    continuous = negative_log_likelihood(exact(ours), ours, x_start, noise, likelihood="continuous")
    assert continuous.terms.shape == (1000, 200) and continuous.total.shape == (1000,)
    assert float(continuous.total.mean()) == pytest.approx(entropy(), abs=error)
    grid = (x_start * 127.5).round() / 127.5  # 8-bit values in [-1, 1], up to half a bin
    discrete = negative_log_likelihood(exact(ours), ours, grid, noise)
    assert float(discrete.total.mean()) == pytest.approx(entropy() + math.log2(255 / 2), abs=error + 0.01)
    assert torch.allclose(discrete.total, discrete.prior + discrete.terms.sum(1))


def test_the_bound_of_a_worse_model_is_larger() -> None:
    ours, random = process(timesteps=200), generator(1)
    x_start = CENTRE + SPREAD * torch.randn(500, 4, generator=random).double()

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=x.dtype)

    def blurred(x: Tensor, t: Tensor) -> Prediction:
        right = exact(ours)(x, t)
        return right._replace(x_start=right.x_start + 0.1, variance_fraction=None)

    best = negative_log_likelihood(exact(ours), ours, x_start, noise).total.mean()
    assert float(negative_log_likelihood(blurred, ours, x_start, noise).total.mean()) > float(best) + 0.1


def test_the_prior_term_is_the_divergence_from_the_normal() -> None:
    ours, x_start = process(schedule="linear", timesteps=5), normal(3, 4)
    bar = float(ours.alphas_cumprod[-1])
    q = torch.distributions.Normal(math.sqrt(bar) * x_start, math.sqrt(1 - bar))
    unit = torch.distributions.Normal(torch.zeros_like(x_start), torch.ones_like(x_start))
    expected = torch.distributions.kl_divergence(q, unit).mean(1) / math.log(2)
    assert torch.allclose(prior_bound(ours, x_start), expected)
    assert bool((prior_bound(process(zero_terminal_snr=True, prediction="v"), x_start) == 0).all())


def test_the_bound_from_some_timesteps_estimates_the_whole() -> None:
    ours, random = process(timesteps=200), generator(1)
    x_start = CENTRE + SPREAD * torch.randn(600, 4, generator=random).double()

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=x.dtype)

    def blurred(x: Tensor, t: Tensor) -> Prediction:
        return exact(ours)(x, t)._replace(variance_fraction=None)

    whole = negative_log_likelihood(blurred, ours, x_start, noise)
    some = negative_log_likelihood(blurred, ours, x_start, noise, timesteps=range(1, 200, 2))
    assert some.terms.shape == (600, 101) and some.mse.shape == (600, 101)
    expected = whole.prior.mean() + whole.terms[:, 0].mean() + 199 / 100 * whole.terms[:, 1::2].mean(0).sum()
    assert float(some.total.mean()) == pytest.approx(float(expected), abs=0.15)
    for timesteps in ([0], [5, 200]):
        with pytest.raises(UsageError, match=r"the bound at timesteps .*; expected some of 1 to 199"):
            negative_log_likelihood(blurred, ours, x_start, noise, timesteps=timesteps)
