"""The Gaussian process: schedules, conversions, posterior and losses, against closed forms and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from unclip.config import DiffusionConfig
from unclip.diffusion import GaussianDiffusion, Prediction, betas, spaced_timesteps
from unclip.errors import UsageError

T = 1000
DIFFUSERS_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def process(**options: object) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig.model_validate(options))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Float64 noise whose values float32 holds exactly, so that a float32 reading of it loses nothing."""
    return torch.randn(*shape, generator=generator(seed)).double()


# ---- schedules ---------------------------------------------------------------------------------------------


def test_linear_betas_are_evenly_spaced() -> None:
    table = betas("linear", T)
    assert table.dtype == np.float64 and table.shape == (T,)
    assert table[0] == pytest.approx(1e-4) and table[-1] == pytest.approx(0.02)
    assert np.diff(table) == pytest.approx((0.02 - 1e-4) / (T - 1))


def test_linear_schedule_of_other_lengths_destroys_as_much() -> None:
    """Scaled by 1000/T, Σβ and so the last ᾱ stay what they are at T = 1000."""
    ends = [np.cumprod(1 - betas("linear", steps))[-1] for steps in (T, 4 * T)]
    assert ends[0] == pytest.approx(ends[1], rel=0.15) and ends[0] < 1e-4
    assert betas("linear", 10).min() > 0 and betas("linear", 10).max() <= 0.999


def test_cosine_betas_give_back_the_squared_cosine() -> None:
    t = np.arange(1, T + 1) / T
    closed = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    bar = np.cumprod(1 - betas("cosine", T))
    assert bar[:-1] == pytest.approx(closed[:-1], rel=1e-9)
    assert betas("cosine", T)[-1] == 0.999  # the closed form would end at ᾱ = 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_agrees_with_diffusers(name: str) -> None:
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule=DIFFUSERS_NAME[name])
    ours = process(schedule=name)
    assert ours.alphas_cumprod == pytest.approx(theirs.alphas_cumprod.double().numpy(), rel=2e-4)
    assert ours.betas == pytest.approx(theirs.betas.double().numpy(), rel=2e-4)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'exponential'.*linear, cosine, quadratic, sigmoid"):
        betas("exponential", T)  # type: ignore[arg-type]


# ---- which timesteps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["ends", "ddim"])
@pytest.mark.parametrize("timesteps", [2, 50, 53])
def test_any_number_of_steps_is_kept_without_repetition(timesteps: int, spacing: str) -> None:
    for steps in range(1, timesteps + 1):
        kept = spaced_timesteps(timesteps, steps, spacing)  # type: ignore[arg-type]
        assert len(set(kept)) == steps and kept == sorted(kept)
        assert kept[0] >= 0 and kept[-1] < timesteps


def test_spacing_ends() -> None:
    assert spaced_timesteps(T, 1) == [T - 1]
    assert spaced_timesteps(T, 2) == [0, T - 1]
    assert spaced_timesteps(T, 5) == [0, 250, 500, 749, 999]
    assert spaced_timesteps(T, T) == list(range(T))
    assert spaced_timesteps(T, 4, "ddim") == [0, 250, 500, 750]


@pytest.mark.parametrize("steps", [0, -3, T + 1])
@pytest.mark.parametrize("spacing", ["ends", "ddim"])
def test_impossible_number_of_steps_is_refused(steps: int, spacing: str) -> None:
    with pytest.raises(UsageError, match=f"{steps} sampling steps asked for.*1 to 1000"):
        spaced_timesteps(T, steps, spacing)  # type: ignore[arg-type]


def test_training_timesteps_are_uniform_and_follow_the_generator() -> None:
    drawn = process(timesteps=10).sample_timesteps(20_000, generator())
    counts = torch.bincount(drawn, minlength=10)
    assert drawn.dtype == torch.int64 and len(counts) == 10  # nothing beyond T − 1
    assert int(counts.min()) >= 1830 and int(counts.max()) <= 2170  # 2000 expected, ±4 standard deviations
    assert torch.equal(drawn, process(timesteps=10).sample_timesteps(20_000, generator()))


@pytest.mark.parametrize("bias", [0.5, 2.0, 4.0])
def test_timestep_bias_is_the_stated_power(bias: float) -> None:
    """t/T = u^(1/bias) has mean bias/(bias + 1)."""
    drawn = process(timestep_bias=bias).sample_timesteps(20_000, generator())
    assert int(drawn.min()) >= 0 and int(drawn.max()) <= T - 1
    assert float(drawn.double().mean() + 0.5) / T == pytest.approx(bias / (bias + 1), abs=0.01)


# ---- q and its conversions ---------------------------------------------------------------------------------


def test_q_sample_has_the_stated_moments() -> None:
    ours, count = process(), 40_000
    for t in (0, 300, 999):
        x_t = ours.q_sample(torch.full((count, 1), 0.7).double(), torch.full((count,), t), normal(count, 1, seed=t))
        bar = ours.alphas_cumprod[t]
        assert float(x_t.mean()) == pytest.approx(math.sqrt(bar) * 0.7, abs=4 * math.sqrt((1 - bar) / count))
        assert float(x_t.var()) == pytest.approx(1 - bar, rel=0.03)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_predictions_round_trip_in_float64(prediction: str, schedule: str) -> None:
    """Reading any output at any (x_t, t) gives an (x_0, ε) pair that leads back to x_t and to that output."""
    ours, t = process(prediction=prediction, schedule=schedule), torch.arange(T)
    x_t, output = normal(T, 3, 2, 2, seed=1), normal(T, 3, 2, 2, seed=2)
    read = ours.to_prediction(output, x_t, t)
    assert read.variance_fraction is None
    x_start, epsilon = read.x_start.double(), read.epsilon.double()
    assert torch.allclose(ours.q_sample(x_start, t, epsilon), x_t, rtol=0, atol=1e-9)
    assert torch.allclose(ours.target(x_start, t, epsilon), output, rtol=0, atol=1e-9)
    assert torch.allclose(ours.epsilon_from(x_t, t, x_start), epsilon, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_the_right_output_reads_as_the_truth(prediction: str) -> None:
    ours, t = process(prediction=prediction), torch.tensor([0, 10, 400, 800])
    x_start, noise = normal(4, 3, 5, 5, seed=1).float(), normal(4, 3, 5, 5, seed=2).float()
    x_t = ours.q_sample(x_start, t, noise)
    assert x_t.dtype == torch.float32
    read = ours.to_prediction(ours.target(x_start, t, noise), x_t, t)
    assert torch.allclose(read.x_start, x_start, atol=1e-4)
    assert torch.allclose(read.epsilon, noise, atol=1e-3)  # at t = 0 a difference is divided by σ = 0.006


def test_velocity_is_the_stated_combination() -> None:
    ours, t = process(), torch.tensor([500])
    bar = ours.alphas_cumprod[500]
    v = ours.velocity(torch.full((1, 1), 2.0), t, torch.full((1, 1), 3.0))
    assert v.item() == pytest.approx(math.sqrt(bar) * 3 - math.sqrt(1 - bar) * 2, rel=1e-6)


def test_learned_variance_is_split_off_and_brought_to_a_fraction() -> None:
    ours = process(variance="learned_range")
    output = torch.cat([torch.full((2, 3, 1, 1), 0.25), torch.full((2, 3, 1, 1), 0.5)], dim=1)
    prediction, fraction = ours.split_output(output, 3)
    assert fraction is not None
    assert torch.equal(prediction, output[:, :3]) and torch.equal(fraction, torch.full((2, 3, 1, 1), 0.75))


# ---- the posterior -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_posterior_is_that_of_two_gaussians(schedule: str) -> None:
    """q(x_{t−1}|x_t, x_0) from multiplying N(x_{t−1}; √ᾱ' x_0, 1−ᾱ') with N(x_t; √α x_{t−1}, β)."""
    ours = process(schedule=schedule)
    beta, bar = ours.betas[1:], ours.alphas_cumprod[:-1]
    precision = 1 / (1 - bar) + (1 - beta) / beta
    assert ours.posterior_variance[1:] == pytest.approx(1 / precision, rel=1e-9)
    assert ours.posterior_coef_x_start[1:] == pytest.approx(np.sqrt(bar) / (1 - bar) / precision, rel=1e-9)
    assert ours.posterior_coef_x_t[1:] == pytest.approx(np.sqrt(1 - beta) / beta / precision, rel=1e-9)
    assert ours.posterior_variance[0] == 0  # its logarithm is the next one's
    assert ours.posterior_log_variance == pytest.approx(np.log(ours.posterior_variance[[1, *range(1, T)]]))
    assert (ours.posterior_coef_x_start[0], ours.posterior_coef_x_t[0]) == pytest.approx((1, 0))


def test_respaced_steps_follow_from_the_kept_products() -> None:
    ours = process()
    kept = [3, 250, 600, 999]
    steps = ours.steps([600, 3, 999, 250, 3])
    assert [step.t for step in steps] == kept[::-1]
    bars = [ours.alphas_cumprod[t] for t in kept]
    assert [step.alpha_bar for step in steps] == bars[::-1]
    assert np.cumprod([1 - step.beta for step in steps[::-1]]) == pytest.approx(np.array(bars), rel=1e-12)
    assert steps[-1].alpha_bar_prev == 1 and steps[-1].posterior_variance == 0
    full = ours.steps(list(range(T)))[::-1]
    assert [s.beta for s in full] == pytest.approx(ours.betas, rel=1e-6)
    assert [s.posterior_variance for s in full] == pytest.approx(ours.posterior_variance, rel=1e-5)


# ---- losses ------------------------------------------------------------------------------------------------


def test_simple_loss_is_the_mean_square_of_each_sample() -> None:
    ours, t = process(prediction="v"), torch.tensor([5, 900, 40])
    x_start, noise, output = (normal(3, 2, 4, 4, seed=i).float() for i in range(3))
    losses = ours.losses(output, x_start, ours.q_sample(x_start, t, noise), t, noise)
    expected = ((output - ours.velocity(x_start, t, noise)) ** 2).mean(dim=(1, 2, 3))
    assert set(losses) == {"mse", "loss", "quartile"} and losses["loss"].shape == (3,)
    assert torch.allclose(losses["loss"], expected) and torch.allclose(losses["mse"], expected)


def reference_bits(ours: GaussianDiffusion, x_start: float, x_t: float, t: int, guess: float, fraction: float) -> float:
    """One value's term of the bound, written anew with scalars (DDPM eq. 5 and 13; Improved DDPM eq. 15)."""
    beta, bar = float(ours.betas[t]), float(ours.alphas_cumprod[t])
    before = float(ours.alphas_cumprod[t - 1]) if t else 1.0
    small = beta * (1 - before) / (1 - bar)
    if t == 0:  # the papers' code puts the second posterior variance in the place of the first, which is 0
        small = float(ours.betas[1]) * (1 - bar) / (1 - float(ours.alphas_cumprod[1]))
    variance = math.exp(fraction * math.log(beta) + (1 - fraction) * math.log(small))

    def mean(x0: float) -> float:
        return (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - bar)

    if t:
        gap = mean(x_start) - mean(max(-1, min(1, guess)))
        return 0.5 * (math.log(variance / small) + (small + gap**2) / variance - 1) / math.log(2)

    def cdf(edge: float) -> float:
        return 0.5 * math.erfc(-(edge - mean(max(-1, min(1, guess)))) / math.sqrt(2 * variance))

    upper = 1.0 if x_start > 0.999 else cdf(x_start + 1 / 255)
    lower = 0.0 if x_start < -0.999 else cdf(x_start - 1 / 255)
    return -math.log2(max(upper - lower, 1e-12))


@pytest.mark.parametrize("t", [0, 1, 40, 700])
def test_bound_agrees_with_a_scalar_computation(t: int) -> None:
    ours = process(variance="learned_range", schedule="linear")
    x_start = torch.tensor([-1.0, 1.0, 0.2, -0.6, 0.9]).view(1, 5, 1, 1).double()
    steps = torch.tensor([t])
    x_t = ours.q_sample(x_start, steps, normal(1, 5, 1, 1, seed=t))
    # At t = 0 the guess is close, as a far one ends in the likelihood's floor.
    guess = x_start + (0.004 if t == 0 else 0.3) * normal(1, 5, 1, 1, seed=t + 1)
    fraction = torch.linspace(0, 1, 5).view(1, 5, 1, 1).double()
    found = ours.variational_bound(Prediction(guess, x_t, fraction), x_start, x_t, steps)
    rows = torch.stack([x_start, x_t, guess, fraction]).view(4, 5).T.tolist()
    expected = np.mean([reference_bits(ours, a, b, t, c, d) for a, b, c, d in rows])
    assert found.item() == pytest.approx(expected, rel=1e-7)


def test_bound_of_the_truth_is_zero() -> None:
    ours = process()
    t = torch.tensor([1, 30, 999])
    x_start = normal(3, 4, seed=1).clamp(-1, 1)
    x_t = ours.q_sample(x_start, t, normal(3, 4, seed=2))
    found = ours.variational_bound(Prediction(x_start, x_t, None), x_start, x_t, t)
    assert found.abs().max().item() < 1e-12
    large = process(variance="fixed_large").variational_bound(Prediction(x_start, x_t, None), x_start, x_t, t)
    assert large[0] > 0.1  # β instead of β̃ costs most where they differ most


def test_hybrid_loss_sends_the_bound_to_the_variance_alone() -> None:
    ours = process(variance="learned_range", prediction="v")
    t = torch.tensor([0, 20, 500, 980])
    x_start, noise = normal(4, 3, 6, 6, seed=1).float().clamp(-1, 1), normal(4, 3, 6, 6, seed=2).float()
    output = normal(4, 6, 6, 6, seed=3).float().mul(0.3).requires_grad_()
    losses = ours.losses(output, x_start, ours.q_sample(x_start, t, noise), t, noise)
    assert torch.allclose(losses["loss"], losses["mse"] + 0.001 * T * losses["vb"])
    (of_bound,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert torch.equal(of_bound[:, :3], torch.zeros_like(of_bound[:, :3]))
    assert bool((of_bound[:, 3:].flatten(1).abs().amax(1) > 0).all())
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert torch.equal(of_mse[:, 3:], torch.zeros_like(of_mse[:, 3:]))
    assert bool((of_mse[:, :3].flatten(1).abs().amax(1) > 0).all())
