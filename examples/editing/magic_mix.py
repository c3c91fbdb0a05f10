"""MagicMix (Liew et al. 2022) on an unCLIP decoder: the layout of one picture, the meaning of a prompt.

    python examples/editing/magic_mix.py pizza.png "basketball" --out mixed.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip import UnCLIP
from unclip.data import make_grid, to_pil
from unclip.diffusion.process import Step
from unclip.diffusion.samplers import Sampler
from unclip.diffusion.samplers.common import Callback, Noise, timestep, transfer
from unclip.errors import UsageError
from unclip.parts import image_pixels


def mixing(layout: Tensor, timesteps: int, nu: float, k_min: float, k_max: float) -> Sampler:
    """A sampler that begins at `layout` (1, 3, S, S), noised to the level k_max · T, and down to k_min · T mixes each
    step's x with the layout noised to its level, ν x + (1 − ν) y (Liew et al. 2022, eq. 5 and algorithm 1); from there
    on it goes on alone. Steps are DDIM's, the noise is one for both, so that their sum keeps its variance.
    """

    def sample(
        denoiser: Any, x: Tensor, steps: Sequence[Step], noise: Noise, *, callback: Callback | None = None, **_: Any
    ) -> Tensor:
        kept = [step for step in steps if (step.t + 1) / timesteps <= k_max] or list(steps[-1:])
        epsilon, own = x, layout.to(x)
        x = transfer(own, epsilon, kept[0].alpha_bar)
        for number, step in enumerate(kept):
            prediction = denoiser(x, timestep(step.t, x))
            x = transfer(prediction.x_start, prediction.epsilon, step.alpha_bar_prev)
            if number + 1 < len(kept) and (kept[number + 1].t + 1) / timesteps >= k_min:
                x = nu * x + (1 - nu) * transfer(own, epsilon, step.alpha_bar_prev)
            if callback is not None:
                callback(number + 1, len(kept), prediction.x_start)
        return x

    return sample


def magic_mix(
    model: UnCLIP,
    image: Any,
    prompt: str,
    *,
    nu: float = 0.5,
    k_min: float = 0.3,
    k_max: float = 0.6,
    seed: int = 0,
    steps: int | str = 40,
) -> Tensor:
    """-> (1, 3, S, S) in [-1, 1] at the decoder's size. The meaning comes in as the prior's image embedding of the
    prompt, and as its caption. UsageError: ν outside 0 … 1, or not 0 ≤ k_min ≤ k_max ≤ 1.
    """
    if not 0 <= nu <= 1 or not 0 <= k_min <= k_max <= 1:
        raise UsageError(f"nu is {nu}, k_min {k_min} and k_max {k_max}; expected 0 to 1 each, k_min up to k_max")
    stage = model.decoder
    pixels = stage.to_x_start(image_pixels(image, stage.config.image_size, model.device))
    sampler = mixing(pixels, stage.process.timesteps, nu, k_min, k_max)
    z = model.predict_embedding(prompt, seed=seed)
    return stage.sample(z, [seed], text=model.embed_text(prompt), steps=steps, sampler=sampler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--nu", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="weight of the prompt's meaning")
    parser.add_argument("--k-min", type=float, default=0.3)
    parser.add_argument("--k-max", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("magic_mix.png"))
    given = parser.parse_args()
    model = UnCLIP.from_pretrained(given.model)
    options = {"k_min": given.k_min, "k_max": given.k_max, "seed": given.seed}
    drawn = torch.cat([magic_mix(model, given.image, given.prompt, nu=nu, **options) for nu in given.nu])
    make_grid([to_pil(image) for image in drawn], columns=len(drawn)).save(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
