"""Configuration of a diffusion process. unclip.config takes it up, and is where others import it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from unclip.config_base import Config

ScheduleName = Literal["linear", "cosine", "quadratic", "sigmoid"]


class XStartClipConfig(Config):
    """What is done to x̂_0 at each sampling step (unclip.diffusion.clip_from)."""

    kind: Literal["none", "static", "dynamic"] = Field(
        "static", description="leave it, clamp it to ±limit, or threshold it dynamically (Imagen, §2.3)"
    )
    limit: float = Field(1.0, gt=0, description="of the static clamp; 1 for pixels in [-1, 1]")
    percentile: float = Field(0.995, gt=0, le=1, description="of |x̂_0| in each sample, for the dynamic threshold")


class DiffusionConfig(Config):
    """The forward process, what a network predicts of it, and how its losses are weighted."""

    schedule: ScheduleName = "cosine"
    beta_range: tuple[float, float] | None = Field(
        None, description="smallest and largest β at T = 1000, by default 1e-4 and 0.02; not for cosine"
    )
    zero_terminal_snr: bool = Field(
        False, description="rescale the schedule so that x_T is pure noise (Lin et al. 2024); needs v or x_start"
    )
    timesteps: int = Field(1000, ge=2, le=100_000)
    prediction: Literal["epsilon", "x_start", "v"] = "epsilon"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    vb_weight: float = Field(0.001, ge=0, description="λ of L_hybrid (Improved DDPM, eq. 16); learned_range only")
    loss_weighting: Literal["none", "min_snr"] = Field(
        "none", description="min_snr: the squared error weighted by min(SNR, γ) in x_0 (Hang et al. 2023)"
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="γ of min_snr")
    timestep_bias: float = Field(
        1.0, gt=0, description="t/T = u^(1/bias), u uniform: 1 draws t uniformly, 2 favours noisy timesteps"
    )
    x_start_clip: XStartClipConfig | None = Field(
        None, description="what is done to x̂_0 while sampling; by default what the stage always did"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionConfig:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr makes x_T pure noise, from which a predicted epsilon tells nothing of x_0; "
                "set prediction to v or x_start"
            )
        if self.zero_terminal_snr and self.loss_weighting == "min_snr":
            raise ValueError(
                "min_snr gives the last timestep of a zero_terminal_snr schedule the weight 0, so that it would never "
                "be trained; leave one of them out"
            )
        if self.beta_range is not None:
            low, high = self.beta_range
            if self.schedule == "cosine":
                raise ValueError("beta_range is given, but the cosine schedule has none; leave it out")
            if not 0 < low < high < 1:
                raise ValueError(f"beta_range is {[low, high]}, expected 0 < smallest < largest < 1")
        return self


class EpsilonStatistics(Config):
    """What Analytic-DPM needs to know of a trained model (Bao et al. 2022, eq. 8); `unclip statistics` measures it.

    It stands in a part's folder as analytic.json.
    """

    timesteps: tuple[int, ...] = Field(min_length=1, description="where it was measured, ascending")
    epsilon_square: tuple[float, ...] = Field(description="Γ_t = E||ε̂(x_t, t)||²/d at those timesteps")
    data_variance: float = Field(gt=0, description="variance of an element of x_0; no x_t leaves more open")
    noise_limit: float | None = Field(
        None, gt=0, description="largest standard deviation of the last noise that is added; for pixels (App. F.2)"
    )
    samples: int = Field(ge=1, description="how many x_0 went into it")

    @model_validator(mode="after")
    def _table(self) -> EpsilonStatistics:
        if len(self.timesteps) != len(self.epsilon_square):
            raise ValueError(f"{len(self.timesteps)} timesteps and {len(self.epsilon_square)} values; expected as many")
        if list(self.timesteps) != sorted(set(self.timesteps)) or self.timesteps[0] < 0:
            raise ValueError("timesteps must ascend from 0 or more")
        if not all(0 <= value < float("inf") for value in self.epsilon_square):
            raise ValueError("epsilon_square holds a negative or infinite value")
        return self
