"""Sampling image embeddings from captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from prior.config import PriorConfig
from prior.network import Prior
from unclip.bundle import load_part, load_strict
from unclip.clip import TextFeatures
from unclip.diffusion import GaussianDiffusion, SeededNoise, get_sampler, make_denoiser, spaced_timesteps, static_clip
from unclip.diffusion.samplers import Callback
from unclip.errors import UnclipError, UsageError

KIND = "prior"


class PriorStage:
    """A trained diffusion prior, ready to sample."""

    def __init__(self, network: Prior, config: PriorConfig, device: torch.device | str = "cpu") -> None:
        self.network = network.eval()
        self.config = config
        self.device = torch.device(device)
        self.process = GaussianDiffusion(config.diffusion)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PriorStage:
        """Read a part written by `train_prior.py`. Raises UnclipError when it is incomplete or does not fit."""
        config, state = load_part(folder, KIND, PriorConfig)
        network = Prior(config)
        load_strict(network, state, folder)
        return cls(network.to(device, dtype).requires_grad_(False), config, device)

    @torch.inference_mode()
    def sample(
        self,
        text: TextFeatures,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        candidates: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Captions' features (B) and one seed each -> image embeddings (B, E) of unit length, float32.

        Of `candidates` samples a caption the one with the largest dot product with the text embedding is kept (unCLIP
        §2.2).
        Raises UnclipError: features that do not fit this prior or the number of seeds, no steps, no candidates.
        """
        config, number = self.config, self.config.candidates if candidates is None else candidates
        if number < 1:
            raise UsageError(f"candidates is {number}; at least one sample a caption must be drawn")
        self._check(text, len(seeds))
        text = text.to(self.device)
        index = torch.arange(len(seeds)).repeat_interleave(number)
        # A candidate's noise hangs on its caption's seed and its own number alone, whatever else is in the batch.
        noise = SeededNoise([seed * 1_000_003 + candidate for seed in seeds for candidate in range(number)])
        repeated = text[index]
        yes = torch.ones(len(index), dtype=torch.bool, device=self.device)
        condition = {
            "text_embedding": repeated.embedding,
            "text_tokens": repeated.tokens,
            "text_mask": repeated.mask,
            "drop_text": ~yes,
        }
        dtype = next(self.network.parameters()).dtype

        def network(x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditioning.items()}
            return self.network(x.to(dtype), t, **cast)  # type: ignore[no-any-return]

        denoiser = make_denoiser(
            network,
            self.process,
            condition,
            {**condition, "drop_text": yes},
            config.guidance if guidance is None else guidance,
            static_clip(config.clip_range),
        )
        steps = config.steps if steps is None else steps
        kept = self.process.steps(spaced_timesteps(self.process.timesteps, steps))
        x = noise.draw((config.embedding_dim,), self.device)
        x = get_sampler(sampler or config.sampler)(denoiser, x, kept, noise, callback=callback)
        embedding = F.normalize(self.network.denormalise(x).float(), dim=1)
        return best_of(embedding.unflatten(0, (len(seeds), number)), text.embedding)

    def _check(self, text: TextFeatures, count: int) -> None:
        tokens = (count, self.config.text_length, self.config.token_dim)
        embedding = (count, self.config.embedding_dim)
        if text.tokens.shape != tokens or text.embedding.shape != embedding:
            raise UnclipError(
                f"text tokens of shape {tuple(text.tokens.shape)} and embeddings of shape "
                f"{tuple(text.embedding.shape)} for "
                f"{count} seeds; this prior takes {tokens} and {embedding}, as the CLIP it was trained with gives them"
            )


def best_of(candidates: Tensor, text_embedding: Tensor) -> Tensor:
    """candidates (B, N, E), text_embedding (B, E) -> (B, E): for each caption the candidate of largest dot product."""
    scores = torch.einsum("bne,be->bn", candidates, text_embedding)
    return candidates[torch.arange(len(candidates)), scores.argmax(dim=1)]
