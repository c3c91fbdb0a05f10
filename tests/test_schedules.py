"""Schedules in closed form, zero terminal SNR, and sampling steps in all their forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_diffusion import T, normal, process
from pydantic import ValidationError

from unclip.config import Config, DiffusionConfig, StepSpec, check_steps, count_steps, parse_config
from unclip.diffusion import betas, timesteps_from, zero_terminal_snr
from unclip.errors import UsageError
from unclip.inputs import SampleOptions

NAMES = ("linear", "cosine", "quadratic", "sigmoid")


# ---- schedules ---------------------------------------------------------------------------------------------


def test_quadratic_is_linear_in_the_root() -> None:
    table = betas("quadratic", T, (0.00085, 0.012))
    assert np.diff(np.sqrt(table)) == pytest.approx((0.012**0.5 - 0.00085**0.5) / (T - 1))
    assert table[[0, -1]] == pytest.approx([0.00085, 0.012])


def test_sigmoid_is_symmetric_about_the_middle_of_its_range() -> None:
    table = betas("sigmoid", T, (1e-4, 0.02))
    assert table + table[::-1] == pytest.approx(1e-4 + 0.02)
    assert table[0] == pytest.approx(1e-4 + 0.0199 / (1 + np.exp(6)))


@pytest.mark.parametrize("timesteps", [2, 10, 100, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_any_length_makes_a_schedule(name: Any, timesteps: int) -> None:
    table = betas(name, timesteps)
    assert table.dtype == np.float64 and table.shape == (timesteps,)
    assert bool((table > 0).all()) and bool((table < 1).all())
    bars = process(schedule=name, timesteps=timesteps).alphas_cumprod
    assert bool((np.diff(bars) < 0).all()) and bars[-1] > 0


@pytest.mark.parametrize("name", ["linear", "quadratic", "sigmoid"])
def test_other_lengths_destroy_as_much(name: Any) -> None:
    ends = [np.log(np.cumprod(1 - betas(name, steps))[-1]) for steps in (T, 4 * T)]
    assert ends[0] == pytest.approx(ends[1], rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_keeps_the_first_and_empties_the_last(name: Any) -> None:
    """sqrt(ᾱ) is shifted and scaled (Lin et al. 2024, algorithm 1)."""
    plain = np.sqrt(np.cumprod(1 - betas(name, T)))
    rescaled = np.sqrt(np.cumprod(1 - zero_terminal_snr(betas(name, T))))
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-12) and rescaled[-1] == 0
    assert rescaled == pytest.approx((plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["v", "x_start"])
def test_nothing_is_nan_at_zero_snr(prediction: str, variance: str) -> None:
    ours = process(schedule="linear", zero_terminal_snr=True, prediction=prediction, variance=variance)
    t = torch.tensor([0, 500, T - 1])
    x_start, noise = normal(3, 2, 4, 4).float().clamp(-1, 1), normal(3, 2, 4, 4, seed=1).float()
    x_t = ours.q_sample(x_start, t, noise)
    assert torch.equal(x_t[2], noise[2])
    output = normal(3, 4 if variance == "learned_range" else 2, 4, 4, seed=2).float()
    read = ours.to_prediction(output, x_t, t)
    assert bool(torch.isfinite(read.x_start).all()) and bool(torch.isfinite(read.epsilon).all())
    for value in ours.losses(output, x_start, x_t, t, noise).values():
        assert bool(torch.isfinite(value).all())


def test_configurations_that_cannot_work_are_refused() -> None:
    for options, message in (
        ({"zero_terminal_snr": True}, r"predicted epsilon tells nothing of x_0; set prediction to v or x_start"),
        (
            {"zero_terminal_snr": True, "prediction": "v", "loss_weighting": "min_snr"},
            r"weight 0.*leave one of them out",
        ),
        ({"beta_range": [1e-4, 0.02]}, r"cosine schedule has none; leave it out"),
        ({"schedule": "linear", "beta_range": [0.02, 1e-4]}, r"expected 0 < smallest < largest < 1"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_config(DiffusionConfig, options)


# ---- sampling steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, expected",
    [
        (5, [0, 250, 500, 749, 999]),
        ("5", [0, 250, 500, 749, 999]),
        ("ends5", [0, 250, 500, 749, 999]),
        ("ddim4", [0, 250, 500, 750]),
        ("trailing4", [249, 499, 749, 999]),
        (1, [999]),
        ("ddim1", [0]),
        ([999, 0, 10], [0, 10, 999]),
        ("999, 0,10", [0, 10, 999]),
        ((7,), [7]),
        ("7,", [7]),
    ],
)
def test_every_form_of_steps(spec: Any, expected: list[int]) -> None:
    assert timesteps_from(spec, T) == expected
    assert count_steps(check_steps(spec)) == len(expected)


def test_the_spacing_of_a_bare_number_is_the_callers() -> None:
    assert timesteps_from(4, T, "ddim") == [0, 250, 500, 750]
    assert timesteps_from("ends2", T, "ddim") == [0, 999]
    assert timesteps_from(2, T, lowest=100) == [100, 999]
    assert timesteps_from([3, 5], T, lowest=100) == [3, 5]


@pytest.mark.parametrize("timesteps", [2, 50, 53])
def test_trailing_keeps_the_end_and_repeats_nothing(timesteps: int) -> None:
    for steps in range(1, timesteps + 1):
        kept = timesteps_from(f"trailing{steps}", timesteps)
        assert len(set(kept)) == steps and kept == sorted(kept)
        assert kept[0] >= 0 and kept[-1] == timesteps - 1


@pytest.mark.parametrize(
    "spec, message",
    [
        (0, r"0 sampling steps asked for; expected 1 or more"),
        (-3, r"-3 sampling steps"),
        ("0", r"0 sampling steps"),
        (1001, r"1001 sampling steps asked for.*1 to 1000"),
        ("ddim1001", r"1001 sampling steps asked for.*1 to 1000"),
        ("ddim0", r"'ddim0'; expected a number such as 50"),
        ("fast9", r"'fast9'; expected a number such as 50, a spacing such as 'ddim50'"),
        (2.5, r"2.5; expected a number"),
        (True, r"True; expected a number"),
        ([], r"\[\]; expected a number"),
        ([0, -1], r"\[0, -1\]; expected a number"),
        ([5, 1000], r"the timestep 1000 does not exist; the process has 0 to 999"),
        ([5, 7, 5], r"the timestep 5 is named twice"),
    ],
)
def test_steps_that_cannot_be(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        timesteps_from(spec, T)


def test_a_configuration_takes_every_form() -> None:
    class Sampling(Config):
        steps: StepSpec = 4

    assert Sampling().steps == 4 and parse_config(Sampling, {"steps": "ddim9"}).steps == "ddim9"
    listed = parse_config(Sampling, {"steps": [0, 500]})
    assert listed.steps == (0, 500) and Sampling.model_validate(listed.model_dump(mode="json")) == listed
    with pytest.raises(UsageError, match=r"steps: 0 sampling steps asked for; expected 1 or more"):
        parse_config(Sampling, {"steps": 0})
    with pytest.raises(ValidationError):
        Sampling(steps="many")


def test_options_take_every_form() -> None:
    assert SampleOptions(prior_steps="ddim9", decoder_steps=[0, 500]).prior_steps == "ddim9"
    with pytest.raises(UsageError, match=r"'often'; expected a number"):
        SampleOptions(upsampler_steps="often")
    with pytest.raises(UsageError, match=r"decoder_steps is 0, expected 1 or more"):
        SampleOptions(decoder_steps=0)
