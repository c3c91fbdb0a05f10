"""The diffusion core against the installed diffusers: tables, posterior, one step and ten steps of every twin.

The formulas are compared to 1e-5 in float32 on the same noise, with the schedule's table shared: diffusers computes ᾱ
in float32, which alone moves a sample of the cosine schedule by 1e-4. The tables are compared by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers_diffusion import T, generator, no_noise, process
from torch import Tensor

from unclip.diffusion import (
    Denoiser,
    GaussianDiffusion,
    ddim_inversion,
    dynamic_threshold,
    get_sampler,
    make_denoiser,
    static_clip,
    timesteps_from,
)

SHAPE = (2, 3, 4, 4)
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "quadratic": "scaled_linear", "sigmoid": "sigmoid"}
KINDS = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}
TOLERANCE = 1e-5


def twin(name: str, ours: GaussianDiffusion, steps: int = 10, **options: Any) -> Any:
    """diffusers' scheduler `name` with our ᾱ, set to `steps` steps."""
    arguments = {"beta_schedule": SCHEDULES[ours.config.schedule], "prediction_type": KINDS[ours.config.prediction]}
    theirs = getattr(diffusers, name)(**arguments, **options)
    theirs.alphas_cumprod, theirs.betas = torch.from_numpy(ours.alphas_cumprod), torch.from_numpy(ours.betas)
    theirs.alphas = 1 - theirs.betas
    theirs.set_timesteps(steps)
    return theirs


def network_of(ours: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """A smooth x̂_0 of both inputs, put out as what the process predicts; with a learned variance, its channels too."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        x_start = 0.8 * torch.tanh(0.9 * x + t.view(-1, *[1] * (x.ndim - 1)) / 700)
        epsilon = ours.epsilon_from(x, t, x_start)
        output = {"x_start": x_start, "epsilon": epsilon, "v": ours.velocity(x_start, t, epsilon)}
        chosen = output[ours.config.prediction]
        return torch.cat([chosen, torch.cos(2 * x)], dim=1) if ours.learns_variance else chosen

    return network


def denoiser_of(ours: GaussianDiffusion, clip: Any = None) -> Denoiser:
    return make_denoiser(network_of(ours), ours, {}, clip=clip)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=generator(1))


class Draws:
    """The same noises for both sides, one a step."""

    def __init__(self, count: int) -> None:
        self.noises = list(torch.randn(count, *SHAPE, generator=generator(5)))
        self.next = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.next += 1
        return self.noises[self.next - 1]


def their_loop(theirs: Any, ours: GaussianDiffusion, **options: Any) -> Tensor:
    x, network = start(), network_of(ours)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def agree(found: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.dtype == torch.float32
    assert float((found - theirs).abs().max()) <= tolerance


# ---- tables ------------------------------------------------------------------------------------------------


RANGES = [(name, given) for name in sorted(SCHEDULES) for given in (None, (0.00085, 0.012))]


# The cosine schedule takes no range.
@pytest.mark.parametrize(("name", "beta_range"), [pair for pair in RANGES if pair != ("cosine", (0.00085, 0.012))])
def test_schedules(name: str, beta_range: tuple[float, float] | None) -> None:
    low, high = beta_range or (1e-4, 0.02)
    theirs = diffusers.DDPMScheduler(beta_schedule=SCHEDULES[name], beta_start=low, beta_end=high)
    ours = process(schedule=name, beta_range=beta_range)
    # float32's rounding of 1 − β, which a cumulative product of 1000 gathers.
    assert ours.betas == pytest.approx(theirs.betas.double().numpy(), rel=2e-4, abs=1e-7)
    assert ours.alphas_cumprod == pytest.approx(theirs.alphas_cumprod.double().numpy(), rel=2e-4)
    assert np.abs(ours.alphas_cumprod - theirs.alphas_cumprod.double().numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["linear", "quadratic", "sigmoid"])
def test_zero_terminal_snr(name: str) -> None:
    theirs = diffusers.DDIMScheduler(
        trained_betas=process(schedule=name).betas, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    ours = process(schedule=name, zero_terminal_snr=True, prediction="v")
    assert np.abs(ours.alphas_cumprod - theirs.alphas_cumprod.double().numpy()).max() < 1e-5
    assert ours.alphas_cumprod[-1] == 0 and ours.betas[-1] == 1


def test_timesteps() -> None:
    for spacing, theirs in (("ends", "linspace"), ("ddim", "leading"), ("trailing", "trailing")):
        for count in (1, 2, 7, 10, 50, 999, 1000):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=theirs)
            scheduler.set_timesteps(count)
            if (spacing, count) == ("ends", 1):
                continue  # theirs is timestep 0, ours the last
            assert timesteps_from(f"{spacing}{count}", T) == scheduler.timesteps.tolist()[::-1]
    karlo = diffusers.UnCLIPScheduler()
    karlo.set_timesteps(25)
    assert timesteps_from(25, T) == karlo.timesteps.tolist()[::-1]


# ---- one step and ten --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_posterior_and_variance(variance: str) -> None:
    """Mean and variance of one DDPM step from every timestep, unrespaced."""
    ours = process(variance=variance, prediction="x_start", schedule="linear")
    theirs = twin("DDPMScheduler", ours, T, variance_type=variance, clip_sample=False)
    x, network = start(), network_of(ours)
    steps = {step.t: step for step in ours.steps(list(range(T)))}
    for t in (999, 500, 20, 1):
        ts = torch.full((2,), t)
        fraction = ours.split_output(network(x, ts), 3)[1]
        drawn = get_sampler("ddpm")(denoiser_of(ours), x, [steps[t], steps[0]], Draws(1))
        silent = theirs.step(network(x, ts), t, x, generator=generator())
        variance_of = theirs._get_variance(t, predicted_variance=None if fraction is None else 2 * fraction - 1)
        deviation = (0.5 * variance_of).exp() if variance == "learned_range" else variance_of**0.5
        noise = torch.randn(SHAPE, generator=generator())
        mean = silent.prev_sample - deviation * noise
        moved = (mean + deviation * Draws(1).noises[0]).float()
        expected = network(moved, torch.zeros(2, dtype=torch.long))[:, :3]  # the last step gives x̂_0
        agree(drawn, expected)


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(schedule: str, kind: str, eta: float, count: int) -> None:
    ours = process(prediction=kind, schedule=schedule)
    theirs = twin("DDIMScheduler", ours, count, clip_sample=False)
    draws = Draws(count)
    found = get_sampler("ddim")(denoiser_of(ours), start(), ours.steps(theirs.timesteps.tolist()), draws, eta=eta)
    x, network = start(), network_of(ours)
    for number, t in enumerate(theirs.timesteps):
        noise = draws.noises[number]
        x = theirs.step(network(x, t.expand(2)), t, x, eta=eta, variance_noise=noise).prev_sample
    agree(found, x)


@pytest.mark.parametrize("clipping", ["static", "dynamic"])
def test_ddim_with_clipping(clipping: str) -> None:
    ours = process(prediction="v", schedule="linear")
    options = {"thresholding": True, "sample_max_value": 100.0} if clipping == "dynamic" else {"clip_sample_range": 0.5}
    theirs = twin("DDIMScheduler", ours, **options)
    clip = dynamic_threshold(0.995) if clipping == "dynamic" else static_clip(0.5)
    found = get_sampler("ddim")(denoiser_of(ours, clip), start(), ours.steps(theirs.timesteps.tolist()), no_noise)
    agree(found, their_loop(theirs, ours, use_clipped_model_output=True))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(variance: str, kind: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = process(prediction=kind, variance=variance, schedule=schedule)
    theirs = twin("DDPMScheduler", ours, variance_type=variance, clip_sample=False)
    draws = Draws(10)
    found = get_sampler("ddpm")(denoiser_of(ours), start(), ours.steps(theirs.timesteps.tolist()), draws)
    noises = iter(draws.noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_args, **_options: next(noises))
    agree(found, their_loop(theirs, ours))


@pytest.mark.parametrize("kind", ["epsilon", "x_start"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("count", [2, 7, 10])
def test_karlos_scheduler(variance: str, kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced with both ends, x̂_0 clamped, the last step giving the clamped x̂_0."""
    ours = process(prediction=kind, variance=variance)
    theirs = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log" if variance == "fixed_small" else variance,
        prediction_type=KINDS[kind],
        clip_sample_range=0.6,
    )
    theirs.alphas_cumprod, theirs.betas = torch.from_numpy(ours.alphas_cumprod), torch.from_numpy(ours.betas)
    theirs.alphas = 1 - theirs.betas
    theirs.set_timesteps(count)
    draws = Draws(count)
    steps = ours.steps(timesteps_from(count, T))
    found = get_sampler("ddpm")(denoiser_of(ours, static_clip(0.6)), start(), steps, draws)
    noises = iter(draws.noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", lambda *_args, **_options: next(noises))
    x, network = start(), network_of(ours)
    for t, before in zip(theirs.timesteps, [*theirs.timesteps[1:], None], strict=True):
        x = theirs.step(network(x, t.expand(2)), t, x, prev_timestep=before).prev_sample
    agree(found, x)
    assert float(found.abs().max()) <= 0.6 + 1e-6


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 10, 25])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_multistep_solvers(name: str, count: int, schedule: str, kind: str) -> None:
    ours = process(prediction=kind, schedule=schedule)
    scheduler = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[name]
    theirs = twin(scheduler, ours, count)
    found = get_sampler(name)(denoiser_of(ours), start(), ours.steps(theirs.timesteps.tolist()), no_noise)
    # At t = 999 alone, x̂_0 from ε is a difference divided by sqrt(ᾱ) = 0.006: float32's rounding, 157 times.
    agree(found, their_loop(theirs, ours), 1e-4 if (count, kind) == (1, "epsilon") else TOLERANCE)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("count", [4, 10, 25])
@pytest.mark.parametrize("name", ["plms", "pndm"])
def test_pndm(name: str, count: int, schedule: str) -> None:
    """For ε alone: diffusers mixes v where v is predicted, and ε is what the paper mixes."""
    ours = process(prediction="epsilon", schedule=schedule)
    theirs = twin("PNDMScheduler", ours, count, skip_prk_steps=name == "plms", set_alpha_to_one=True)
    kept = timesteps_from(f"ddim{count}", T)
    found = get_sampler(name)(denoiser_of(ours), start(), ours.steps(kept), no_noise)
    agree(found, their_loop(theirs, ours))


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_inversion(schedule: str, count: int) -> None:
    """For ε alone: from a predicted x_0 diffusers divides by the clean image's σ, which is 0."""
    ours = process(prediction="epsilon", schedule=schedule)
    theirs = twin("DDIMInverseScheduler", ours, count, clip_sample=False)
    found = ddim_inversion(denoiser_of(ours), start(), ours.steps(theirs.timesteps.tolist()), no_noise)
    agree(found, their_loop(theirs, ours))


@pytest.mark.parametrize(
    "name, sampler", [("UniPCMultistepScheduler", "unipc"), ("DPMSolverMultistepScheduler", "dpmpp_2m")]
)
def test_with_diffusers_own_float32_table(name: str, sampler: str) -> None:
    """Nothing shared but the noise: apart by the rounding of their ᾱ."""
    ours = process(prediction="x_start", schedule="linear")
    theirs = getattr(diffusers, name)(beta_schedule="linear", prediction_type="sample")
    theirs.set_timesteps(10)
    found = get_sampler(sampler)(denoiser_of(ours), start(), ours.steps(theirs.timesteps.tolist()), no_noise)
    agree(found, their_loop(theirs, ours))
