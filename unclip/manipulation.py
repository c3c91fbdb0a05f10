"""Between images and along texts (unCLIP, §3.2 and §3.3): interpolation and text diffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.errors import UsageError
from unclip.frames import resize
from unclip.geometry import angle_between, linear_schedule, path, slerp, text_difference
from unclip.inputs import SampleOptions, Steps, check_output, check_prompts, check_seeds
from unclip.inversion import NOT_WITH_LATENTS, Inversion, refuse_sampling
from unclip.latents import Latents
from unclip.parts import image_pixels
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

_SAME = 1e-4  # radians; equal pictures come within 1e-6 of each other


@dataclass(frozen=True)
class Prompt:
    """An end of an interpolation that is a prompt; a plain string is the path of an image there."""

    text: str


class Manipulation(Inversion):
    """The methods `between`, `interpolate`, `toward`, `text_diff` and `frames_of` of UnCLIP."""

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
            refuse_sampling(chosen)
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

    @overload
    def interpolate(self, ends: Sequence[Any], *, output: Literal["pil"] = ..., **options: Any) -> list[Image]: ...
    @overload
    def interpolate(self, ends: Sequence[Any], *, output: Literal["tensor"], **options: Any) -> Tensor: ...
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
        check_output(output)
        self.timings = Timings()
        latents = self.between(ends, frames=frames, seed=seed, progress=progress, **options)
        known = {name: value for name, value in options.items() if name in SampleOptions.__dataclass_fields__}
        return self.frames_of(latents, seed=seed, output=output, progress=progress, **known)

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

    @overload
    def text_diff(self, image: Any, text: str, *, output: Literal["pil"] = ..., **options: Any) -> list[Image]: ...
    @overload
    def text_diff(self, image: Any, text: str, *, output: Literal["tensor"], **options: Any) -> Tensor: ...
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
        check_output(output)
        refuse_sampling(self._options(options))
        self.timings = Timings()
        own: dict[str, Any] = {"steps": steps, "refinements": refinements, "progress": progress}
        latents = self.toward(image, text, base=base, max_theta=max_theta, frames=frames, **own)
        return self.frames_of(latents, seed=seed, output=output, progress=progress, **options)

    @overload
    def frames_of(self, latents: Latents, *, output: Literal["pil"] = ..., **options: Any) -> list[Image]: ...
    @overload
    def frames_of(self, latents: Latents, *, output: Literal["tensor"], **options: Any) -> Tensor: ...
    def frames_of(
        self,
        latents: Latents,
        *,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The pictures of `between` or `toward`, all with the same seed; options: of SampleOptions, those of the
        decoder only where the noise is fixed.
        """
        if latents.noise is not None:
            options = {name: value for name, value in options.items() if name not in NOT_WITH_LATENTS}
        chosen, seeds = self._options(options), check_seeds(seed, len(latents))
        return self._finish(self._replay(latents, seeds, 0.0, chosen, progress), output)

    # ---- inside ----------------------------------------------------------------------------------------

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
        small = self.decoder.config.image_size
        for place, end in enumerate(ends):
            if isinstance(end, Prompt):
                embeddings[place], pictures[place] = self._drawn(end.text, seed, inverted, options, progress)
            elif place not in given:
                pictures[place] = image_pixels(end, small, self.device)
                if len(pictures[place]) != 1:
                    raise UsageError(f"an end is a single picture, got {len(pictures[place])}")
                embeddings[place] = self._timed("clip", partial(self.embed_image, end))
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
        small = replace(options, size=self.decoder.config.image_size)
        return z, self._render(z, self._caption([text], features), [seed], small, progress)
