"""Samplers: plain functions over a denoiser, all with one signature.

`sampler(denoiser, x, steps, noise, *, eta=…, callback=…) -> x_0`, where `x` is x_T (B, …), `steps` comes from
`GaussianDiffusion.steps(timesteps)` and `noise(x)` draws standard normal noise of x's shape. The callback hears
`(number, total, x̂_0)` after each step. `ddim_inversion` goes the other way, from x_0 to x_T, and is no member of
SAMPLERS; nor are `sdedit` and `repaint`, which make a sampler for a given picture, and `ddpm_large`, with which DDIM's
table compares.
"""

from __future__ import annotations

from unclip.diffusion.samplers.ancestral import analytic, ddpm, ddpm_large
from unclip.diffusion.samplers.common import Callback, Noise, Sampler, SeededNoise
from unclip.diffusion.samplers.editing import repaint, sdedit, sdedit_timesteps
from unclip.diffusion.samplers.implicit import ddim, ddim_inversion
from unclip.diffusion.samplers.multistep import dpmpp_2m, unipc
from unclip.diffusion.samplers.pseudo import plms, pndm
from unclip.errors import UsageError

__all__ = [
    "SAMPLERS",
    "Callback",
    "Noise",
    "Sampler",
    "SeededNoise",
    "analytic",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "ddpm_large",
    "dpmpp_2m",
    "get_sampler",
    "plms",
    "pndm",
    "repaint",
    "sdedit",
    "sdedit_timesteps",
    "unipc",
]

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "pndm": pndm,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "analytic": analytic,
}


def get_sampler(name: str | Sampler) -> Sampler:
    """The sampler called `name`, or one itself; UsageError lists the known ones."""
    if not isinstance(name, str):
        return name
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
