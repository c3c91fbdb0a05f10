"""The diffusion process, its samplers and guidance. Nothing here knows a network's architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.diffusion.augment import noise_augment, sample_levels
    from unclip.diffusion.clipping import Clip, clip_from, dynamic_threshold, static_clip
    from unclip.diffusion.gradient import classifier_guidance, clip_guidance
    from unclip.diffusion.guidance import Condition, Denoiser, make_denoiser
    from unclip.diffusion.losses import BoundTerms, negative_log_likelihood
    from unclip.diffusion.process import GaussianDiffusion, Prediction, Step
    from unclip.diffusion.samplers import (
        SAMPLERS,
        SeededNoise,
        analytic,
        ddim,
        ddim_inversion,
        ddpm,
        dpmpp_2m,
        get_sampler,
        plms,
        pndm,
        unipc,
    )
    from unclip.diffusion.schedule import betas, zero_terminal_snr
    from unclip.diffusion.timesteps import spaced_timesteps, timesteps_from
    from unclip.diffusion.variance import measure_epsilon_statistics, pixel_noise_limit

__all__ = [
    "SAMPLERS",
    "BoundTerms",
    "Clip",
    "Condition",
    "Denoiser",
    "GaussianDiffusion",
    "Prediction",
    "SeededNoise",
    "Step",
    "analytic",
    "betas",
    "classifier_guidance",
    "clip_from",
    "clip_guidance",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpmpp_2m",
    "dynamic_threshold",
    "get_sampler",
    "make_denoiser",
    "measure_epsilon_statistics",
    "negative_log_likelihood",
    "noise_augment",
    "pixel_noise_limit",
    "plms",
    "pndm",
    "sample_levels",
    "spaced_timesteps",
    "static_clip",
    "timesteps_from",
    "unipc",
    "zero_terminal_snr",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.diffusion.augment": ["noise_augment", "sample_levels"],
        "unclip.diffusion.clipping": ["Clip", "clip_from", "dynamic_threshold", "static_clip"],
        "unclip.diffusion.gradient": ["classifier_guidance", "clip_guidance"],
        "unclip.diffusion.guidance": ["Condition", "Denoiser", "make_denoiser"],
        "unclip.diffusion.losses": ["BoundTerms", "negative_log_likelihood"],
        "unclip.diffusion.process": ["GaussianDiffusion", "Prediction", "Step"],
        "unclip.diffusion.samplers": [
            "SAMPLERS",
            "SeededNoise",
            "analytic",
            "ddim",
            "ddim_inversion",
            "ddpm",
            "dpmpp_2m",
            "get_sampler",
            "plms",
            "pndm",
            "unipc",
        ],
        "unclip.diffusion.schedule": ["betas", "zero_terminal_snr"],
        "unclip.diffusion.timesteps": ["spaced_timesteps", "timesteps_from"],
        "unclip.diffusion.variance": ["measure_epsilon_statistics", "pixel_noise_limit"],
    },
)
