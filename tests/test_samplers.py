"""Samplers with denoisers that are known exactly: moments, orders of convergence, inversion; noise by seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers_diffusion import (
    DEVIATION,
    MEAN,
    MODES,
    WEIGHTS,
    T,
    draw_mixture,
    exact,
    exact_mixture,
    generator,
    mixture_mean_and_variance,
    no_noise,
    normal,
    process,
)
from torch import Tensor

from unclip.config import DETERMINISTIC, EpsilonStatistics, SamplerName
from unclip.diffusion import (
    SAMPLERS,
    GaussianDiffusion,
    SeededNoise,
    ddim,
    ddim_inversion,
    get_sampler,
    make_denoiser,
    measure_epsilon_statistics,
    spaced_timesteps,
)
from unclip.diffusion.variance import analytic_variance
from unclip.errors import UnclipError, UsageError


def fresh_noise(seed: int = 1) -> Callable[[Tensor], Tensor]:
    random = generator(seed)
    return lambda x: torch.randn(x.shape, generator=random, dtype=x.dtype)


def with_statistics(ours: GaussianDiffusion, gamma: Any, variance: float) -> GaussianDiffusion:
    """A process that knows Γ_t = gamma(ᾱ_t)."""
    values = tuple(float(gamma(bar)) for bar in ours.alphas_cumprod)
    ours.use_statistics(
        EpsilonStatistics(
            timesteps=tuple(range(ours.timesteps)), epsilon_square=values, data_variance=variance, samples=1
        )
    )
    return ours


def gaussian_gamma(bar: float) -> float:
    """E||ε̂||²/d of the exact denoiser of N(MEAN, DEVIATION²): (1−ᾱ)/(ᾱ s² + 1 − ᾱ), averaged over dimensions."""
    return float(((1 - bar) / (bar * DEVIATION**2 + 1 - bar)).mean())


def flow(ours: GaussianDiffusion, x: Tensor, t: int = T - 1) -> Tensor:
    """Where the exact probability flow takes x_t: quantiles stay quantiles."""
    bar = float(ours.alphas_cumprod[t])
    return MEAN + DEVIATION * (x - math.sqrt(bar) * MEAN) / (bar * DEVIATION**2 + 1 - bar).sqrt()


# ---- exact denoisers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, eta, schedule",
    [
        ("ddpm", 1.0, "cosine"),
        ("analytic", 1.0, "linear"),
        ("ddim", 1.0, "linear"),
        *((name, 0.0, schedule) for name in ("ddim", *DETERMINISTIC) for schedule in ("linear", "cosine")),
    ],
)
def test_every_sampler_returns_mean_and_variance(name: str, eta: float, schedule: str) -> None:
    """Within 4.5 standard errors of the mean of 4000 samples, and 6 % of the deviation."""
    ours, count, noise = process(schedule=schedule), 4000, fresh_noise()
    if name == "analytic":
        with_statistics(ours, gaussian_gamma, float((DEVIATION**2).mean()))
    steps = ours.steps(spaced_timesteps(T, (200 if name == "analytic" else 600) if eta else 200))
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
    assert error("unipc", 100) < error("unipc", 50) / 3.2
    assert error("unipc", 100) < error("dpmpp_2m", 100)
    for name in ("plms", "pndm"):
        assert error(name, 100) < error(name, 50) / 3.5
        assert error(name, 100) < 0.2 * error("ddim", 100)


def test_one_step_goes_to_the_mean() -> None:
    ours, x = with_statistics(process(), gaussian_gamma, 0.2), normal(3, 2)
    steps = ours.steps([700])
    expected = exact(ours)(x, torch.tensor([700])).x_start
    for name in SAMPLERS:
        assert torch.allclose(get_sampler(name)(exact(ours), x, steps, no_noise), expected)


@pytest.mark.parametrize("name, eta", [("ddpm", 1.0), ("ddim", 0.0), *((name, 0.0) for name in DETERMINISTIC)])
def test_every_sampler_draws_the_mixture(name: str, eta: float) -> None:
    """Mean and variance of the mixture, and each mode's share, within five standard errors of 3000 samples."""
    ours, count = process(), 3000
    steps = ours.steps(spaced_timesteps(T, 150 if eta else 60))
    x = get_sampler(name)(exact_mixture(ours), normal(count, 2), steps, fresh_noise(), eta=eta)
    mean, variance = mixture_mean_and_variance()
    assert bool(((x.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all())
    assert torch.allclose(x.var(0), variance, rtol=0.08)
    nearest = (x[:, None] - MODES).square().sum(-1).argmin(1)
    share = float((nearest == 0).double().mean())
    assert share == pytest.approx(float(WEIGHTS[0]), abs=5 * math.sqrt(0.21 / count))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "plms", "pndm", "ddpm"])
def test_pure_noise_at_the_end_of_the_schedule_is_no_trouble(name: str) -> None:
    ours = process(schedule="linear", prediction="v", zero_terminal_snr=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        """v of the exact denoiser; at ᾱ = 0, −E[x_0]."""
        alpha, sigma = ours.alpha_sigma(t, x)
        x_start = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        return (alpha * x - x_start) / sigma

    count = 2000
    steps = ours.steps(spaced_timesteps(T, 40, "trailing"))
    assert steps[0].alpha_bar == 0
    eta = 1.0 if name == "ddpm" else 0.0
    x = get_sampler(name)(make_denoiser(network, ours, {}), normal(count, 2), steps, fresh_noise(), eta=eta)
    assert bool(((x.mean(0) - MEAN).abs() < 5 * DEVIATION / math.sqrt(count)).all())
    assert torch.allclose(x.std(0), DEVIATION, rtol={"ddpm": 0.3, "ddim": 0.2}.get(name, 0.08))


# ---- Analytic-DPM ------------------------------------------------------------------------------------------


def test_analytic_variance_is_that_of_the_exact_reverse_step() -> None:
    """Var(x_s|x_t) of a Gaussian is β̃ + (posterior coefficient of x_0)² Var(x_0|x_t), at any spacing."""
    ours = with_statistics(process(), lambda bar: (1 - bar) / (bar * 0.25 + 1 - bar), 0.25)
    for step in ours.steps(spaced_timesteps(T, 12))[:-1]:
        left_open = 0.25 * (1 - step.alpha_bar) / (step.alpha_bar * 0.25 + 1 - step.alpha_bar)
        coef = math.sqrt(step.alpha_bar_prev) * step.beta / (1 - step.alpha_bar)
        assert analytic_variance(step) == pytest.approx(step.posterior_variance + coef**2 * left_open, rel=1e-6)


def test_analytic_variance_keeps_the_data_variance_where_the_smallest_loses_it() -> None:
    def gamma(bar: float) -> float:
        return (1 - bar) / (bar * 0.25 + 1 - bar)

    ours, count = with_statistics(process(), gamma, 0.25), 20_000

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = ours.alpha_sigma(t, x)
        return sigma / (alpha**2 * 0.25 + sigma**2) * x  # ε̂ of N(0, 0.5²)

    denoiser, steps = make_denoiser(network, ours, {}), ours.steps(spaced_timesteps(T, 6))
    optimal = get_sampler("analytic")(denoiser, normal(count, 1), steps, fresh_noise())
    smallest = get_sampler("ddpm")(denoiser, normal(count, 1), steps, fresh_noise())
    implicit = get_sampler("analytic")(denoiser, normal(count, 1), steps, fresh_noise(), eta=0.0)
    # The last step goes to the mean; what it leaves out is Var(x_0|x_1), a quarter of a percent.
    assert float(optimal.var()) == pytest.approx(0.25, rel=0.03)
    assert float(implicit.var()) == pytest.approx(0.25, rel=0.03)
    assert float(smallest.var()) < 0.8 * 0.25


def test_statistics_are_measured_on_data_and_interpolated() -> None:
    ours = process()
    x_start = MEAN + DEVIATION * normal(4000, 2, seed=9)
    batches = [(exact(ours), x_start[:2500]), (exact(ours), x_start[2500:])]
    measured = measure_epsilon_statistics(batches, ours, [900, 100, 500], generator(3))
    assert measured.timesteps == (100, 500, 900) and measured.samples == 4000
    for t, found in zip(measured.timesteps, measured.epsilon_square, strict=True):
        assert found == pytest.approx(gaussian_gamma(float(ours.alphas_cumprod[t])), rel=0.06)
    assert measured.data_variance == pytest.approx(float((DEVIATION**2).mean()), rel=0.06)
    ours.use_statistics(measured)
    step = ours.steps([300])[0]
    bar, middle = step.alpha_bar, (measured.epsilon_square[0] + measured.epsilon_square[1]) / 2
    assert step.x_start_variance == pytest.approx((1 - bar) / bar * (1 - middle), rel=1e-9)


def test_statistics_beyond_their_bounds_are_held() -> None:
    """Γ > 1 means β̃, and near pure noise no more than the data's variance is left open (theorem 2)."""
    ours = with_statistics(process(), lambda _: 1.7, 0.3)
    step = ours.steps([200, 600])[0]
    assert step.x_start_variance == 0 and analytic_variance(step) == pytest.approx(step.posterior_variance)
    ours = with_statistics(process(), lambda _: 0.9, 0.3)
    assert ours.steps([990])[0].x_start_variance == 0.3
    zero = process(zero_terminal_snr=True, prediction="v")
    assert with_statistics(zero, lambda _: 0.9, 0.3).steps([T - 1])[0].x_start_variance == 0.3


def test_the_last_noise_of_pixels_is_limited() -> None:
    known = {"timesteps": (0, 999), "epsilon_square": (0.5, 0.9), "data_variance": 1.0, "samples": 1}
    ours = process()
    ours.use_statistics(EpsilonStatistics(**known, noise_limit=0.02))
    steps = ours.steps([0, 100, 400])
    assert [step.noise_limit for step in steps] == [None, 0.02, None]
    assert analytic_variance(steps[1]) == pytest.approx(0.02**2)
    assert analytic_variance(steps[0]) > 0.01


def test_analytic_without_statistics_names_the_command() -> None:
    ours = process()
    with pytest.raises(UnclipError, match=r"statistics that this model does not have.*`unclip statistics"):
        get_sampler("analytic")(exact(ours), normal(1, 2), ours.steps([10, 500]), fresh_noise())
    with pytest.raises(UsageError, match=r"no samples"):
        measure_epsilon_statistics([], ours, [10], generator())
    with pytest.raises(UsageError, match=r"timesteps \[1000\]; expected some of 0 to 999"):
        measure_epsilon_statistics([], ours, [1000], generator())
    short = process(timesteps=100)
    known = EpsilonStatistics(timesteps=(500,), epsilon_square=(0.5,), data_variance=1.0, samples=1)
    with pytest.raises(UnclipError, match="measured at timestep 500, this process has 100"):
        short.use_statistics(known)


# ---- inversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_inversion_then_ddim_returns_the_input(schedule: str) -> None:
    """With refinements within 1e-3 at 100 steps; without, as far off as DDIM's first order is."""
    ours = process(schedule=schedule)
    steps = ours.steps(spaced_timesteps(T, 100, "ddim"))
    x_start, _ = draw_mixture(100)

    def error(refinements: int, kept: Any) -> float:
        x_t = ddim_inversion(exact_mixture(ours), x_start, kept, no_noise, refinements=refinements)
        return float((ddim(exact_mixture(ours), x_t, kept, no_noise) - x_start).abs().max())

    plain, refined = error(0, steps), error(8, steps)
    assert refined < 1e-3 < plain
    assert error(0, ours.steps(spaced_timesteps(T, 500, "ddim"))) < 0.5 * plain


def test_ddim_inversion_gives_the_noise_that_the_flow_gives() -> None:
    ours = process(schedule="linear")
    x_start = MEAN + DEVIATION * normal(50, 2)
    x_t = ddim_inversion(exact(ours), x_start, ours.steps(list(range(T))), no_noise)
    assert torch.allclose(flow(ours, x_t), x_start, atol=5e-3)
    heard: list[Any] = []
    ddim_inversion(exact(ours), x_start, ours.steps([1, 500]), no_noise, callback=lambda *call: heard.append(call[:2]))
    assert heard == [(1, 2), (2, 2)]


# ---- errors and callbacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_refuse_noise(name: str) -> None:
    ours = process()
    with pytest.raises(UsageError, match=rf"{name} is deterministic.*got 0.5"):
        get_sampler(name)(exact(ours), normal(1, 2), ours.steps([500]), no_noise, eta=0.5)


def test_unknown_samplers_are_named() -> None:
    assert tuple(SAMPLERS) == get_args(SamplerName)  # what configurations may name
    with pytest.raises(UsageError, match=r"'heun'.*ddpm, ddim, plms, pndm, dpmpp_2m, unipc, analytic"):
        get_sampler("heun")
    with pytest.raises(UsageError, match=r"ddim_inversion is deterministic"):
        ddim_inversion(exact(process()), normal(1, 2), process().steps([500]), no_noise, eta=1.0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_callback_hears_every_step(name: str) -> None:
    ours, heard = with_statistics(process(), gaussian_gamma, 0.2), []
    steps = ours.steps(spaced_timesteps(T, 4))
    result = get_sampler(name)(
        exact(ours), normal(3, 2), steps, SeededNoise([0, 1, 2]), callback=lambda *call: heard.append(call)
    )
    assert [call[:2] for call in heard] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.allclose(heard[-1][2], result, atol=0.05)  # x̂_0 at t = 0, with plms and pndm not quite the result


def test_evaluations_are_as_many_as_stated() -> None:
    ours = process()
    counts = {}
    for name in ("ddim", "unipc", "dpmpp_2m", "plms", "pndm"):
        calls: list[int] = []

        def counted(x: Tensor, t: Tensor, calls: list[int] = calls) -> Any:
            calls.append(int(t[0]))
            return exact(ours)(x, t)

        get_sampler(name)(counted, normal(1, 2), ours.steps(spaced_timesteps(T, 10, "ddim")), no_noise)
        counts[name] = len(calls)
    assert counts == {"ddim": 10, "unipc": 10, "dpmpp_2m": 10, "plms": 11, "pndm": 19}


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


@pytest.mark.parametrize(
    "name, eta",
    [("ddpm", 1.0), ("analytic", 1.0), ("ddim", 0.0), ("ddim", 1.0), *((name, 0.0) for name in DETERMINISTIC)],
)
def test_a_seed_gives_the_same_sample_in_any_batch(name: str, eta: float) -> None:
    ours = with_statistics(process(), gaussian_gamma, 0.2)
    steps = ours.steps(spaced_timesteps(T, 5))
    run: Callable[..., Tensor] = get_sampler(name)

    def network(x: Tensor, t: Tensor) -> Tensor:
        """Any smooth function of both inputs does."""
        return torch.sin(3 * x + t[0] / 300) * 0.7 + 0.2 * x

    def sample(seeds: list[int]) -> Tensor:
        noise = SeededNoise(seeds)
        return run(make_denoiser(network, ours, {}), noise.draw((3, 4, 4)), steps, noise, eta=eta)

    assert torch.equal(sample([4, 9, 2])[1], sample([9])[0])
