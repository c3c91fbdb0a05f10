"""Samplers with an exact denoiser and against diffusers' step by step; guidance; noise by seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from unclip.config import DiffusionConfig
from unclip.diffusion import (
    SAMPLERS,
    Denoiser,
    GaussianDiffusion,
    Prediction,
    SeededNoise,
    dynamic_threshold,
    get_sampler,
    make_denoiser,
    spaced_timesteps,
    static_clip,
)
from unclip.diffusion.process import Step
from unclip.errors import UsageError

T = 1000
# A data set of two independent normal dimensions.
MEAN = torch.tensor([0.8, -0.3], dtype=torch.float64)
DEVIATION = torch.tensor([0.5, 0.2], dtype=torch.float64)


def process(**options: object) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig.model_validate(options))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).double()


def no_noise(x: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def exact(ours: GaussianDiffusion, steps: list[Step] | None = None) -> Denoiser:
    """E[x_0|x_t] of N(MEAN, DEVIATION²). With `steps`, also the exact variance's fraction."""
    by_t = {step.t: step for step in steps or []}

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        bar = float(ours.alphas_cumprod[int(t[0])])
        total = bar * DEVIATION**2 + 1 - bar
        x_start = MEAN + math.sqrt(bar) * DEVIATION**2 / total * (x - math.sqrt(bar) * MEAN)
        epsilon = (x - math.sqrt(bar) * x_start) / math.sqrt(1 - bar)
        fraction = None
        if by_t and by_t[int(t[0])].alpha_bar_prev < 1:
            step = by_t[int(t[0])]
            coef = math.sqrt(step.alpha_bar_prev) * step.beta / (1 - bar)
            wanted = step.posterior_variance + coef**2 * DEVIATION**2 * (1 - bar) / total
            small = math.log(step.posterior_variance)
            fraction = ((wanted.log() - small) / (math.log(step.beta) - small)).expand_as(x)
            assert bool((fraction >= 0).all()) and bool((fraction <= 1).all())  # the bounds hold it
        elif by_t:
            fraction = torch.zeros_like(x)
        return Prediction(x_start, epsilon, fraction)

    return denoise


def flow(ours: GaussianDiffusion, x: Tensor, t: int = T - 1) -> Tensor:
    """Where the exact probability flow takes x_t: quantiles stay quantiles."""
    bar = float(ours.alphas_cumprod[t])
    return MEAN + DEVIATION * (x - math.sqrt(bar) * MEAN) / (bar * DEVIATION**2 + 1 - bar).sqrt()


# ---- exact denoisers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name, eta", [("ddpm", 1.0), ("ddim", 1.0), ("ddim", 0.0), ("dpmpp_2m", 0.0)])
def test_every_sampler_returns_mean_and_variance(name: str, eta: float, schedule: str) -> None:
    ours, count, random = process(schedule=schedule), 4000, generator(1)
    steps = ours.steps(spaced_timesteps(T, T if eta else 200))

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=x.dtype)

    x = get_sampler(name)(exact(ours), normal(count, 2), steps, noise, eta=eta)
    error = DEVIATION / math.sqrt(count)
    assert bool(((x.mean(0) - MEAN).abs() < 4.5 * error).all())
    assert torch.allclose(x.std(0), DEVIATION, rtol=0.06)
    assert abs(float(torch.corrcoef(x.T)[0, 1])) < 0.08


def test_ddpm_with_the_exact_variance_needs_few_steps() -> None:
    """A learned variance is what lets few steps keep the data's variance; the smallest loses much of it."""
    ours = process(variance="learned_range")
    steps, count, random = ours.steps(spaced_timesteps(T, 8)), 20_000, generator(1)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=x.dtype)

    learned = get_sampler("ddpm")(exact(ours, steps), normal(count, 2), steps, noise)
    fixed = get_sampler("ddpm")(exact(ours), normal(count, 2), steps, noise)
    assert torch.allclose(learned.std(0), DEVIATION, rtol=0.03)
    assert torch.allclose(learned.mean(0), MEAN, atol=0.02)
    assert bool((fixed.std(0) < 0.9 * DEVIATION).all())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_is_the_product_of_its_linear_steps(schedule: str) -> None:
    ours, x = process(schedule=schedule), normal(5, 2)
    kept = spaced_timesteps(T, 17)
    bars = [1.0, *(float(ours.alphas_cumprod[t]) for t in kept)]
    centred = x - math.sqrt(bars[-1]) * MEAN
    for bar, before in zip(bars[:0:-1], bars[-2::-1], strict=True):
        covariance = math.sqrt(bar * before) * DEVIATION**2 + math.sqrt((1 - bar) * (1 - before))
        centred = centred * covariance / (bar * DEVIATION**2 + 1 - bar)
    result = get_sampler("ddim")(exact(ours), x, ours.steps(kept), no_noise)
    assert torch.allclose(result, MEAN + centred, rtol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_deterministic_samplers_converge_to_the_flow_at_their_order(schedule: str) -> None:
    """On steps even in log-SNR, as the solvers' analysis has them; it takes many timesteps."""
    ours, start = process(schedule=schedule, timesteps=100_000), 90_000
    bars = ours.alphas_cumprod[: start + 1]
    log_snr = np.log(bars / (1 - bars))
    x = normal(50, 2) * (bars[start] * DEVIATION**2 + 1 - bars[start]).sqrt() + math.sqrt(bars[start]) * MEAN

    def error(name: str, count: int) -> float:
        grid = np.linspace(log_snr[start], log_snr[10], count)
        steps = ours.steps([int(np.abs(log_snr - place).argmin()) for place in grid])
        found = get_sampler(name)(exact(ours), x, steps, no_noise)
        return float((found - flow(ours, x, start)).abs().max())

    assert error("ddim", 200) == pytest.approx(error("ddim", 100) / 2, rel=0.1)
    assert error("dpmpp_2m", 100) == pytest.approx(error("dpmpp_2m", 50) / 4, rel=0.3)
    assert error("dpmpp_2m", 100) < 0.2 * error("ddim", 100) < 0.02


def test_deterministic_samplers_take_one_step_to_the_mean() -> None:
    ours, x = process(), normal(3, 2)
    steps = ours.steps([700])
    expected = exact(ours)(x, torch.tensor([700])).x_start
    for name in SAMPLERS:
        assert torch.allclose(get_sampler(name)(exact(ours), x, steps, no_noise), expected)


# ---- parity with diffusers ---------------------------------------------------------------------------------


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function of both inputs does."""
    return torch.sin(3 * x + t[0] / 300) * 0.7 + 0.2 * x


def from_network(ours: GaussianDiffusion, double: bool = False) -> Denoiser:
    return make_denoiser(lambda x, t: _doubled(x, t) if double else network(x, t), ours, {})


def _doubled(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([network(x, t), torch.cos(2 * x)], dim=1)


class Draws:
    """The same noises for both sides, one a step."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.noises = list(torch.randn(count, *shape, generator=generator(5)))
        self.next = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.next += 1
        return self.noises[self.next - 1]


KINDS = [("epsilon", "epsilon"), ("x_start", "sample"), ("v", "v_prediction")]
NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("ours_kind, their_kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_agrees_with_diffusers(ours_kind: str, their_kind: str, eta: float) -> None:
    ours, shape = process(prediction=ours_kind, schedule="linear"), (2, 3, 4, 4)
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type=their_kind)
    theirs.set_timesteps(10)
    kept = spaced_timesteps(T, 10, "ddim")
    assert theirs.timesteps.tolist() == kept[::-1]
    x = torch.randn(shape, generator=generator(1))
    draws = Draws(shape, 10)
    found = get_sampler("ddim")(from_network(ours), x, ours.steps(kept), draws, eta=eta)
    for number, t in enumerate(theirs.timesteps):
        output = network(x, t[None])
        x = theirs.step(output, t, x, eta=eta, variance_noise=draws.noises[number]).prev_sample
    assert torch.allclose(found, x, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_agrees_with_diffusers(variance: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, shape = process(prediction="v", variance=variance, schedule=schedule), (2, 3, 4, 4)
    theirs = DDPMScheduler(
        beta_schedule=NAMES[schedule],
        variance_type=variance,
        clip_sample=False,
        prediction_type="v_prediction",
    )
    theirs.set_timesteps(10)
    x = torch.randn(shape, generator=generator(1))
    draws, double = Draws(shape, 10), variance == "learned_range"
    steps = ours.steps(spaced_timesteps(T, 10, "ddim"))
    found = get_sampler("ddpm")(from_network(ours, double), x, steps, draws)
    noises = iter(draws.noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_args, **_options: next(noises))
    for t in theirs.timesteps:
        output = _doubled(x, t[None]) if double else network(x, t[None])
        x = theirs.step(output, t, x).prev_sample
    assert torch.allclose(found, x, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("ours_kind, their_kind", KINDS)
@pytest.mark.parametrize("count", [2, 8, 25])
def test_dpmpp_2m_agrees_with_diffusers(ours_kind: str, their_kind: str, count: int) -> None:
    ours = process(prediction=ours_kind, schedule="linear")
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        final_sigmas_type="zero",
        prediction_type=their_kind,
    )
    theirs.set_timesteps(count)
    x = torch.randn(2, 3, 4, 4, generator=generator(1))
    found = get_sampler("dpmpp_2m")(from_network(ours), x, ours.steps(theirs.timesteps.tolist()), no_noise)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t[None]), t, x).prev_sample
    assert torch.allclose(found, x, rtol=2e-3, atol=5e-4)


def test_dpmpp_2m_refuses_noise_and_unknown_samplers_are_named() -> None:
    ours = process()
    with pytest.raises(UsageError, match=r"deterministic.*got 0.5"):
        get_sampler("dpmpp_2m")(exact(ours), normal(1, 2), ours.steps([500]), no_noise, eta=0.5)
    with pytest.raises(UsageError, match=r"'heun'.*ddpm, ddim, dpmpp_2m"):
        get_sampler("heun")


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_callback_hears_every_step(name: str) -> None:
    ours, heard = process(), []
    steps = ours.steps(spaced_timesteps(T, 4))
    result = get_sampler(name)(
        exact(ours), normal(3, 2), steps, SeededNoise([0, 1, 2]), callback=lambda *call: heard.append(call)
    )
    assert [call[:2] for call in heard] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.allclose(heard[-1][2], result)


# ---- guidance ----------------------------------------------------------------------------------------------


class Spy:
    """Puts out its condition's value, and a variance channel that tells the halves apart."""

    def __init__(self, double: bool = False) -> None:
        self.batches: list[int] = []
        self.double = double

    def __call__(self, x: Tensor, t: Tensor, *, y: Tensor, other: Tensor | None) -> Tensor:
        assert len(x) == len(t) == len(y) and other is None
        self.batches.append(len(x))
        output = x + y[:, None]
        return torch.cat([output, y[:, None].expand_as(x)], dim=1) if self.double else output


def guided(scale: float, spy: Spy, **options: Any) -> tuple[Prediction, Tensor]:
    ours = process(prediction="x_start", variance="learned_range" if spy.double else "fixed_small")
    x = normal(3, 2, seed=1).float()
    condition = {"y": torch.tensor([1.0, 2.0, 3.0]), "other": None}
    null = {"y": torch.tensor([-1.0]), "other": None}  # one row stands for all
    denoiser = make_denoiser(spy, ours, condition, null, scale, **options)
    return denoiser(x, torch.tensor([100, 100, 100])), x


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_guidance_is_the_stated_combination_in_one_call(scale: float) -> None:
    spy = Spy()
    prediction, x = guided(scale, spy)
    conditional = x + torch.tensor([[1.0], [2.0], [3.0]])
    expected = (x - 1) + scale * (conditional - (x - 1))
    assert torch.allclose(prediction.x_start, expected, atol=1e-6)
    assert spy.batches == [3 if scale == 1 else 6]  # 1 is the conditional model, at its price
    if scale == 1:
        assert torch.equal(prediction.x_start, conditional)
    if scale == 0:
        assert torch.equal(prediction.x_start, x - 1)


def test_guidance_takes_the_variance_of_the_conditional_half() -> None:
    prediction, _ = guided(3.0, Spy(double=True))
    assert prediction.variance_fraction is not None
    expected = torch.tensor([[1.0], [1.5], [2.0]]).expand(3, 2)  # (y + 1)/2
    assert torch.equal(prediction.variance_fraction, expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_epsilon_follows_the_clipped_x_start(scale: float) -> None:
    prediction, x = guided(scale, Spy(), clip=static_clip(1.5))
    assert float(prediction.x_start.abs().max()) == 1.5
    ours, t = process(), torch.tensor([100, 100, 100])
    assert torch.allclose(ours.q_sample(prediction.x_start, t, prediction.epsilon), x, atol=1e-5)


def test_static_clip() -> None:
    assert static_clip(2.0)(torch.tensor([-5.0, 0.3, 7.0])).tolist() == pytest.approx([-2, 0.3, 2])


def test_dynamic_threshold_divides_by_the_percentile_of_each_sample() -> None:
    inside = torch.linspace(-0.9, 0.9, 101)
    outside = torch.linspace(-4, 4, 101)
    result = dynamic_threshold(0.9)(torch.stack([inside, outside]).view(2, 1, 1, 101))
    assert torch.equal(result[0].flatten(), inside)  # s is at least 1
    s = torch.quantile(outside.abs(), 0.9)
    assert 3 < float(s) < 4
    assert torch.allclose(result[1].flatten(), outside.clamp(-s, s) / s)


# ---- noise -------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_noise_in_any_batch() -> None:
    together = SeededNoise([3, 8, 3])
    first, second = together.draw((2, 4, 4)), together(torch.empty(3, 2, 4, 4, dtype=torch.float64))
    alone = SeededNoise([8])
    assert torch.equal(alone.draw((2, 4, 4))[0], first[1])
    assert torch.equal(alone(torch.empty(1, 2, 4, 4))[0].double(), second[1])
    assert second.dtype == torch.float64
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert not torch.equal(first, second.float())  # a generator moves on


@pytest.mark.parametrize("name, eta", [("ddpm", 1.0), ("ddim", 0.0), ("ddim", 1.0), ("dpmpp_2m", 0.0)])
def test_a_seed_gives_the_same_sample_in_any_batch(name: str, eta: float) -> None:
    ours = process()
    steps = ours.steps(spaced_timesteps(T, 5))
    run: Callable[..., Tensor] = get_sampler(name)

    def sample(seeds: list[int]) -> Tensor:
        noise = SeededNoise(seeds)
        return run(from_network(ours), noise.draw((3, 4, 4)), steps, noise, eta=eta)

    assert torch.equal(sample([4, 9, 2])[1], sample([9])[0])
