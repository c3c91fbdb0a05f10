"""The paper's manipulations of images (unCLIP, §3): reconstruction, variations, interpolation, text diffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unclip.diffusion import SeededNoise, timesteps_from
from unclip.diffusion.latents import invert, lowest_level, replay
from unclip.errors import UsageError
from unclip.frames import resize
from unclip.geometry import angle_between, linear_schedule, path, slerp, text_difference
from unclip.inputs import SampleOptions, Steps, check_count, check_prompts, check_seeds
from unclip.latents import Latents, Origin, digest
from unclip.parts import image_pixels
from unclip.stages import Stages, heard
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

_BATCH = 8
_SAME = 1e-4  # radians; equal pictures come within 1e-6 of each other
_NOT_WITH_LATENTS = (
    "guidance", "guidance_text", "guidance_interval", "guidance_rescale", "decoder_steps", "sampler",
    "embedding_noise_level", "eta",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """An end of an interpolation that is a prompt; a plain string is the path of an image there."""

    text: str


class Manipulation(Stages):
    """The methods `encode`, `reconstruct`, `between`, `interpolate`, `toward` and `text_diff` of UnCLIP."""

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
        pixels = image_pixels(images, self.decoder.config.unet.image_size, self.device)
        embedding = self._timed("clip", lambda: self._clip_embedding(images))
        return self._encode(pixels, embedding, steps, refinements, progress)

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
        chosen = self._options(options)
        _refuse(chosen)
        _check_eta(eta)
        self.timings = Timings()
        if not isinstance(latents, Latents):
            latents = self.encode(latents, steps=steps, progress=progress)
        seeds = check_seeds(seed, len(latents))
        return self._finish(self._replay(latents, seeds, eta, chosen, progress), output)

    def between(
        self,
        ends: Sequence[Any],
        *,
        frames: int = 9,
        noise: Literal["inverted", "fixed"] = "inverted",
        loop: bool = False,
        seed: int = 0,
        steps: Steps = 25,
        refinements: int = 1,
        progress: Progress | None = None,
        **options: Any,
    ) -> Latents:
        """Latents on the way over two or more ends, great circles from each to the next (unCLIP, §3.2).

        Each end is an image (as in `encode`), latents of one picture, or a `Prompt`, which stands for the picture that
        `sample` draws of it with this seed and for the prior's embedding. `frames` from one end to the next, both
        included; `loop` goes back to the first. noise: "inverted" moves x_T along with z_i, so that the ends
        are the pictures themselves; "fixed" leaves x_T to be drawn, one for all. options: of SampleOptions, for
        prompts. Raises UsageError: fewer than 2 ends or frames, neighbours that are the same or opposite.
        """
        chosen = self._options(options)
        if noise not in ("inverted", "fixed"):
            raise UsageError(f"noise is {noise!r}, expected 'inverted' or 'fixed'")
        way = path(len(ends), frames, loop)
        prompts = [end.text for end in ends if isinstance(end, Prompt)]
        if prompts:
            check_prompts(prompts)
        elif noise == "inverted":
            _refuse(chosen)
        check_seeds(seed, 1)
        found = self._ends(list(ends), noise == "inverted", seed, steps, refinements, chosen, progress)
        z = found.embedding
        for before, after in {(i, j) for i, j, _ in way if i != j}:
            if float(angle_between(z[before], z[after])) < _SAME:
                raise UsageError(
                    f"ends {before + 1} and {after + 1} have the same CLIP embedding, so that nothing lies between "
                    "them; name two different pictures"
                )
        first, second = [i for i, _, _ in way], [j for _, j, _ in way]
        weight = torch.tensor([w for _, _, w in way], dtype=torch.float64, device=z.device)
        embedding = slerp(z[first], z[second], weight)
        if found.noise is None:
            return replace(found, embedding=embedding)
        x = found.noise.flatten(1)
        moved = slerp(x[first], x[second], weight).view(-1, *found.noise.shape[1:])
        return replace(found, embedding=embedding, noise=moved)

    def interpolate(
        self,
        ends: Sequence[Any],
        *,
        frames: int = 9,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The pictures of `between`, whose arguments it takes, and the options of SampleOptions."""
        self.timings = Timings()
        latents = self.between(ends, frames=frames, seed=seed, progress=progress, **options)
        return self._frames(latents, seed, options, output, progress)

    def toward(
        self,
        image: Any,
        text: str,
        *,
        base: str = "",
        max_theta: float = 0.5,
        frames: int = 9,
        steps: Steps = 25,
        refinements: int = 1,
        progress: Progress | None = None,
    ) -> Latents:
        """Latents of an image turned towards a text diff (unCLIP, §3.3): z = slerp(z_i, z_d, θ), z_d = norm(z_t − z_t0)
        with the CLIP text embeddings of `text` and of `base` (default: the empty caption), θ from 0 to `max_theta`
        evenly; x_T stays the image's own. `image` may be latents of one picture.

        θ is the share of the way to z_d; the paper goes to 0.25 … 0.5. Raises UsageError: max_theta outside (0, 1],
        fewer than 2 frames, captions of the same embedding, no text, several images.
        """
        if not 0 < max_theta <= 1:
            raise UsageError(f"max_theta is {max_theta:g}, expected above 0 and at most 1 (the paper: 0.25 … 0.5)")
        thetas = linear_schedule(max_theta, frames)
        check_prompts(text)
        embedded = self.clip.encode_text([text, base]).embedding
        z_d = text_difference(embedded[:1], embedded[1:])
        found = self._ends([image], True, 0, steps, refinements, SampleOptions(), progress)
        z = found.embedding
        moved = found.repeated(frames)
        weight = torch.tensor(thetas, dtype=torch.float64, device=z.device)
        target = (z_d.to(z.device) * z.norm(dim=1, keepdim=True)).expand(frames, -1)
        return replace(moved, embedding=slerp(moved.embedding, target, weight))

    def text_diff(
        self,
        image: Any,
        text: str,
        *,
        base: str = "",
        max_theta: float = 0.5,
        frames: int = 9,
        steps: Steps = 25,
        refinements: int = 1,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The pictures of `toward`, whose arguments it takes; options: size, upsampler_steps, memory_limit."""
        _refuse(self._options(options))
        self.timings = Timings()
        own: dict[str, Any] = {"steps": steps, "refinements": refinements, "progress": progress}
        latents = self.toward(image, text, base=base, max_theta=max_theta, frames=frames, **own)
        return self._frames(latents, seed, options, output, progress)

    # ---- inside ----------------------------------------------------------------------------------------

    def _clip_embedding(self, images: Any) -> Tensor:
        """z_i as the decoder takes it, (B, E)."""
        unit = self.decoder.config.embedding_length == "unit"
        return self.clip.encode_image(image_pixels(images, self.clip.image_size, self.device), unit_length=unit)

    @torch.inference_mode()
    def _encode(
        self, pixels: Tensor, embedding: Tensor, steps: Steps, refinements: int, progress: Progress | None
    ) -> Latents:
        process, size = self.decoder.process, self.decoder.config.unet.image_size
        x_start = resize(pixels, size) if pixels.shape[-2:] != (size, size) else pixels
        denoiser = self.decoder.conditional(embedding)

        def work() -> tuple[Tensor, tuple[int, ...]]:
            lowest = 0
            if isinstance(steps, (int, str)):
                lowest = min(int(lowest_level(denoiser, x_start, process).max()), process.timesteps - 2)
            kept = timesteps_from(steps, process.timesteps, lowest=lowest)
            told = heard("inversion", progress)
            return invert(denoiser, x_start, process.steps(kept), refinements=refinements, callback=told), tuple(kept)

        noise, kept = self._timed("inversion", work)
        return Latents(embedding, noise, kept, self.origin)

    def _ends(
        self,
        ends: list[Any],
        inverted: bool,
        seed: int,
        steps: Steps,
        refinements: int,
        options: SampleOptions,
        progress: Progress | None,
    ) -> Latents:
        """One row an end; without `inverted` the embeddings alone. Latents that were given set the timesteps."""
        own = self.origin
        given = {place: end for place, end in enumerate(ends) if isinstance(end, Latents)}
        for latents in given.values():
            latents.check(own)
        if any(len(latents) != 1 for latents in given.values()):
            raise UsageError("an end is a single picture, and these latents are of several; take one, as latents[:1]")
        spans = {latents.timesteps for latents in given.values()}
        if inverted and len(spans) > 1:
            raise UsageError("the latents come from inversions over different timesteps; encode them in one call")
        embeddings: dict[int, Tensor] = {place: one.embedding.to(self.device) for place, one in given.items()}
        pictures: dict[int, Tensor] = {}
        small = self.decoder.config.unet.image_size
        for place, end in enumerate(ends):
            if isinstance(end, Prompt):
                embeddings[place], pictures[place] = self._drawn(end.text, seed, inverted, options, progress)
            elif place not in given:
                pictures[place] = image_pixels(end, small, self.device)
                if len(pictures[place]) != 1:
                    raise UsageError(f"an end is a single picture, got {len(pictures[place])}")
                embeddings[place] = self._timed("clip", partial(self._clip_embedding, end))
        z = torch.cat([embeddings[place] for place in range(len(ends))])
        if not inverted:
            return Latents(z, None, (), own)
        noise = {place: latents.noise for place, latents in given.items()}
        timesteps = next(iter(spans), None)
        if pictures:
            kept = list(timesteps) if timesteps else steps
            x_start = torch.cat([resize(one, small) for one in pictures.values()])
            found = self._encode(x_start, z[list(pictures)], kept, refinements, progress)
            assert found.noise is not None
            noise |= {place: found.noise[row : row + 1] for row, place in enumerate(pictures)}
            timesteps = found.timesteps
        rows = [noise[place] for place in range(len(ends))]
        if any(row is None for row in rows):
            raise UsageError("these latents have no noise; encode the picture")
        return Latents(z, torch.cat([row.to(self.device) for row in rows if row is not None]), timesteps or (), own)

    def _drawn(
        self, text: str, seed: int, pictured: bool, options: SampleOptions, progress: Progress | None
    ) -> tuple[Tensor, Tensor]:
        """The prior's embedding (1, E) of a prompt, and the decoder's picture (1, 3, S, S) where it is needed."""
        features = self._timed("clip", lambda: self.embed_text(text))
        z = self._prior(features, [seed], options, progress)
        if not pictured:
            return z, torch.empty(0)
        small = replace(options, size=self.decoder.config.unet.image_size)
        return z, self._render(z, self._caption([text], features), [seed], small, progress)

    def _frames(
        self, latents: Latents, seed: int, options: dict[str, Any], output: str, progress: Progress | None
    ) -> Any:
        known = {name: value for name, value in options.items() if name in SampleOptions.__dataclass_fields__}
        if latents.noise is not None:
            known = {name: value for name, value in known.items() if name not in _NOT_WITH_LATENTS}
        chosen = self._options(known)
        return self._finish(self._replay(latents, [seed] * len(latents), 0.0, chosen, progress), output)

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
        return images.clamp(-1, 1)

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
        _refuse(replace(options, eta=None))
        _check_eta(eta)
        if len(latents) != 1:
            raise UsageError(f"variations takes one image, got {len(latents)}")
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        return self._replay(latents.repeated(num_images), seeds, eta, options, progress)


def _refuse(options: SampleOptions) -> None:
    """UsageError for options that would part the noise of an inversion from its picture."""
    for name in _NOT_WITH_LATENTS:
        if getattr(options, name) is not None:
            raise UsageError(
                f"{name} is of no use here: the noise of an inversion belongs to its own timesteps, without guidance; "
                "leave it out"
            )


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta:g}, expected 0 (the picture itself) to 1 (x_T forgotten)")
