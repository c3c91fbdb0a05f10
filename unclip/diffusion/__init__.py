"""The diffusion process, its samplers and guidance. Nothing here knows a network's architecture."""

from unclip.diffusion.augment import noise_augment, sample_levels
from unclip.diffusion.clipping import Clip, dynamic_threshold, static_clip
from unclip.diffusion.guidance import Condition, Denoiser, make_denoiser
from unclip.diffusion.process import GaussianDiffusion, Prediction, Step
from unclip.diffusion.samplers import SAMPLERS, SeededNoise, ddim, ddpm, dpmpp_2m, get_sampler
from unclip.diffusion.schedule import betas, spaced_timesteps

__all__ = [
    "SAMPLERS",
    "Clip",
    "Condition",
    "Denoiser",
    "GaussianDiffusion",
    "Prediction",
    "SeededNoise",
    "Step",
    "betas",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dynamic_threshold",
    "get_sampler",
    "make_denoiser",
    "noise_augment",
    "sample_levels",
    "spaced_timesteps",
    "static_clip",
]
