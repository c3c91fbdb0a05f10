"""Images as bipartite latents (z_i, x_T) and back (unCLIP, §3): reconstruction, and variations from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.diffusion import SeededNoise, timesteps_from
from unclip.diffusion.latents import highest_level, invert, lowest_level, replay
from unclip.digest import digest
from unclip.errors import UsageError
from unclip.frames import resize
from unclip.geometry import peak_signal_to_noise
from unclip.inputs import SampleOptions, Steps, check_count, check_output, check_seeds
from unclip.latents import Latents, Origin
from unclip.parts import image_pixels
from unclip.stages import Stages, heard
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

_BATCH = 8
NOT_WITH_LATENTS = (
    "guidance", "guidance_text", "guidance_interval", "guidance_rescale", "decoder_steps", "sampler",
    "embedding_noise_level", "eta",
)  # fmt: skip


@dataclass(frozen=True)
class RoundTrip:
    """A picture encoded and drawn again: its latents, the tensor (1, 3, S, S) in [-1, 1] at the wanted size, and the
    peak signal-to-noise ratio in dB at the decoder's own size.
    """

    latents: Latents
    image: Tensor
    psnr: float


class Inversion(Stages):
    """The methods `encode`, `reconstruct` and `round_trip`, and the part of `variations` that starts from latents."""

    @property
    def origin(self) -> Origin:
        """What this model's latents are marked with."""
        decoder = self.decoder
        return Origin(
            self.name,
            decoder.config.diffusion.prediction,
            digest(decoder.network, decoder.config),
            digest(self.clip.model),
        )

    def encode(
        self, images: Any, *, steps: Steps = 100, refinements: int = 1, progress: Progress | None = None
    ) -> Latents:
        """Bipartite latents (z_i, x_T) of images: CLIP's embedding, and the noise that DDIM inversion of the decoder
        finds, without guidance or caption (unCLIP, §3).

        `images` is a path, a PIL image, a tensor (B, 3, H, W) in [-1, 1], or a list; pictures are brought to the
        decoder's size. Images of one call share their timesteps: `steps` of them, up from the level at which the
        decoder explains the worst of them (unclip.diffusion.latents), or those of a list. Each refinement is one more
        pass through the decoder a step. Raises UsageError: fewer than 2 steps, refinements below 0; ImageError: a
        file that is no image.
        """
        if refinements < 0:
            raise UsageError(f"refinements is {refinements}, expected 0 or more")
        pixels = image_pixels(images, self.decoder.config.image_size, self.device)
        embedding = self._timed("clip", lambda: self.embed_image(images))
        return self._encode(pixels, embedding, steps, refinements, progress)

    @overload
    def reconstruct(self, latents: Any, *, output: Literal["pil"] = ..., **options: Any) -> list[Image]: ...
    @overload
    def reconstruct(self, latents: Any, *, output: Literal["tensor"], **options: Any) -> Tensor: ...
    def reconstruct(
        self,
        latents: Any,
        *,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        steps: Steps = 100,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The pictures of latents, or of images, which are encoded first (with `steps`).

        eta 0 gives the pictures back; larger ones draw noise, by `seed`, up to 1, which forgets x_T. The upsamplers
        draw with `seed` too. options: size, upsampler_steps and memory_limit of SampleOptions. Raises UsageError: eta
        outside 0 … 1, guidance or steps for noise that was found without; UnclipError: another model's latents.
        """
        check_output(output)
        chosen = self._options(options)
        refuse_sampling(chosen)
        _check_eta(eta)
        self.timings = Timings()
        if not isinstance(latents, Latents):
            latents = self.encode(latents, steps=steps, progress=progress)
        seeds = check_seeds(seed, len(latents))
        return self._finish(self._replay(latents, seeds, eta, chosen, progress), output)

    def round_trip(
        self,
        image: Any,
        *,
        steps: Steps = 100,
        refinements: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> RoundTrip:
        """Encode one image and draw it again; see `encode` and `reconstruct` for the arguments."""
        chosen, size = self._options(options), self.decoder.config.image_size
        refuse_sampling(chosen)
        seeds = check_seeds(seed, 1)
        self.timings = Timings()
        truth = image_pixels(image, size, self.device)
        if len(truth) != 1:
            raise UsageError(f"a round trip takes one image, got {len(truth)}")
        latents = self.encode(image, steps=steps, refinements=refinements, progress=progress)
        small = self._replay(latents, seeds, 0.0, replace(chosen, size=size), progress)
        psnr = float(peak_signal_to_noise(small, resize(truth, size)))
        return RoundTrip(latents, self._enlarge(small, seeds, chosen, progress), psnr)

    # ---- inside ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _encode(
        self, pixels: Tensor, embedding: Tensor, steps: Steps, refinements: int, progress: Progress | None
    ) -> Latents:
        process, size = self.decoder.process, self.decoder.config.image_size
        x_start = self.decoder.to_x_start(resize(pixels, size))
        denoiser = self.decoder.conditional(embedding)

        def work() -> tuple[Tensor, tuple[int, ...]]:
            if isinstance(steps, (int, str)):
                highest = highest_level(process)
                lowest = min(int(lowest_level(denoiser, x_start, process).max()), highest - 1)
                kept = timesteps_from(steps, highest + 1, lowest=lowest)
            else:
                kept = timesteps_from(steps, process.timesteps)
            told = heard("inversion", progress)
            return invert(denoiser, x_start, process.steps(kept), refinements=refinements, callback=told), tuple(kept)

        noise, kept = self._timed("inversion", work)
        return Latents(embedding, noise, kept, self.origin)

    def _replay(
        self, latents: Latents, seeds: list[int], eta: float, options: SampleOptions, progress: Progress | None
    ) -> Tensor:
        """Latents -> images (B, 3, S, S) in [-1, 1] at the wanted size, some at a time."""
        latents.check(self.origin)
        parts = []
        for start in range(0, len(latents), _BATCH):
            part, own = latents[start : start + _BATCH], seeds[start : start + _BATCH]
            z = part.embedding.to(self.device)
            if part.noise is None:
                parts.append(self._render(z, None, own, options, progress))
            else:
                images = self._undone(z, part.noise.to(self.device), part.timesteps, own, eta, options, progress)
                parts.append(self._enlarge(images, own, options, progress))
        return torch.cat(parts)

    @torch.inference_mode()
    def _undone(
        self,
        embedding: Tensor,
        noise: Tensor,
        timesteps: Sequence[int],
        seeds: list[int],
        eta: float,
        options: SampleOptions,
        progress: Progress | None,
    ) -> Tensor:
        denoiser, steps = self.decoder.conditional(embedding), self.decoder.process.steps(timesteps)
        told = heard("decoder", progress)
        images: Tensor = self._timed(
            "decoder", lambda: replay(denoiser, noise, steps, SeededNoise(seeds), eta=eta, callback=told)
        )
        return self._timed("decoder", lambda: self.decoder.to_pixels(images))  # type: ignore[no-any-return]

    def _varied(
        self,
        latents: Latents,
        num_images: int,
        seed: int,
        eta: float,
        options: SampleOptions,
        progress: Progress | None,
    ) -> Tensor:
        """Variations from (z_i, x_T): image i with the noise of seed + i, as much of it as `eta` says."""
        check_count(num_images)
        refuse_sampling(replace(options, eta=None))
        _check_eta(eta)
        if len(latents) != 1:
            raise UsageError(f"variations takes one image, got {len(latents)}")
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        return self._replay(latents.repeated(num_images), seeds, eta, options, progress)


def refuse_sampling(options: SampleOptions) -> None:
    """UsageError for options that would part the noise of an inversion from its picture."""
    for name in NOT_WITH_LATENTS:
        if getattr(options, name) is not None:
            raise UsageError(
                f"{name} is of no use here: the noise of an inversion belongs to its own timesteps, without guidance; "
                "leave it out"
            )


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta:g}, expected 0 (the picture itself) to 1 (x_T forgotten)")
