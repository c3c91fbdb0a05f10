"""Sampling images from CLIP image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decoder.config import DecoderConfig
from decoder.network import Decoder
from unclip.bundle import load_part, load_strict
from unclip.clip import TextFeatures
from unclip.diffusion import GaussianDiffusion, SeededNoise, get_sampler, make_denoiser, spaced_timesteps, static_clip
from unclip.diffusion.samplers import Callback
from unclip.errors import UnclipError

KIND = "decoder"


class DecoderStage:
    """A trained decoder, ready to sample."""

    def __init__(self, network: nn.Module, config: DecoderConfig, device: torch.device | str = "cpu") -> None:
        self.network = network.eval()
        self.config = config
        self.device = torch.device(device)
        self.process = GaussianDiffusion(config.diffusion)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DecoderStage:
        """Read a part written by `train_decoder.py`. Raises UnclipError when it is incomplete or does not fit."""
        config, state = load_part(folder, KIND, DecoderConfig)
        network = Decoder(config)
        load_strict(network, state, folder)
        network = network.to(device, dtype).requires_grad_(False)
        return cls(network.to(memory_format=torch.channels_last), config, device)  # type: ignore[call-overload]

    @torch.inference_mode()
    def sample(
        self,
        embedding: Tensor | None,
        seeds: Sequence[int],
        *,
        text: TextFeatures | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Image embeddings (B, E) of unit length (None: the learned null), one seed a sample, and optionally captions
        -> images (B, 3, S, S) in [-1, 1], float32. Guidance scale 1 is the plain conditional model.
        """
        config, count = self.config, len(seeds)
        if embedding is not None and embedding.shape != (count, config.embedding_dim):
            raise UnclipError(
                f"image embeddings of shape {tuple(embedding.shape)}; this decoder takes ({count}, "
                f"{config.embedding_dim})"
            )
        tokens = (count, config.text_length, config.token_dim)
        if text is not None and text.tokens.shape != tokens:
            raise UnclipError(
                f"text tokens of shape {tuple(text.tokens.shape)}; this decoder takes {tokens}, as the CLIP "
                "it was trained "
                "with gives them"
            )
        condition = self._condition(embedding, text, count)
        yes = torch.ones(count, dtype=torch.bool, device=self.device)
        null = {**condition, "drop_embedding": yes, "drop_text": yes}
        dtype = next(self.network.parameters()).dtype

        def network(x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditioning.items()}
            return self.network(x.to(dtype).contiguous(memory_format=torch.channels_last), t, **cast)  # type: ignore[no-any-return]

        denoiser = make_denoiser(
            network, self.process, condition, null, config.guidance if guidance is None else guidance, static_clip()
        )
        noise = SeededNoise(seeds)
        size = config.unet.image_size
        x = noise.draw((3, size, size), self.device)
        steps = config.steps if steps is None else steps
        kept = self.process.steps(spaced_timesteps(self.process.timesteps, steps))
        options = {} if eta is None else {"eta": eta}
        return get_sampler(sampler or config.sampler)(denoiser, x, kept, noise, callback=callback, **options).clamp(
            -1, 1
        )

    def _condition(self, embedding: Tensor | None, text: TextFeatures | None, count: int) -> dict[str, Tensor]:
        config, device = self.config, self.device
        flags = torch.zeros(count, dtype=torch.bool, device=device)
        shape = (count, config.text_length)
        return {
            "image_embedding": torch.zeros(count, config.embedding_dim, device=device)
            if embedding is None
            else embedding.to(device).float(),
            "text_tokens": torch.zeros(*shape, config.token_dim, device=device)
            if text is None
            else text.tokens.to(device),
            "text_mask": torch.zeros(*shape, dtype=torch.bool, device=device) if text is None else text.mask.to(device),
            "drop_embedding": flags | (embedding is None),
            "drop_text": flags | (text is None),
        }
