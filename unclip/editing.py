"""Editing pictures with an unCLIP system: inpainting, outpainting, SDEdit. A mask's polarity: 1 = repaint, 0 = keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.clip import TextFeatures
from unclip.diffusion import get_sampler, timesteps_from
from unclip.diffusion.samplers import repaint, sdedit, sdedit_timesteps
from unclip.errors import UsageError
from unclip.frames import Crop, Frame, fill_unknown, frame_around, margins, plan_frames, resize
from unclip.geometry import slerp
from unclip.inputs import SampleOptions, check_count, check_output, check_seeds
from unclip.masks import check_mask, dilate, feather, mask_box, read_mask, repainted_cells
from unclip.parts import image_pixels
from unclip.stages import Stages, heard
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

@dataclass(frozen=True)
class Resampling:
    """How RePaint goes about it, for decoders that were not trained to inpaint."""

    steps: int = 10
    """Sampling steps, unless `decoder_steps` says otherwise or the model itself takes more."""
    jump_length: int = 3
    """Levels that are gone back up at once, j of the paper."""
    resamplings: int = 3
    """Times that each stretch is gone down, r of the paper; 1 never goes back."""

    def __post_init__(self) -> None:
        for name in ("steps", "jump_length", "resamplings"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 1 or more")


class Editing(Stages):
    """The methods `inpaint`, `outpaint` and `edit` of UnCLIP."""

    @overload
    def inpaint(
        self, image: Any, mask: Any, prompt: str | None = ..., *, output: Literal["pil"] = ..., **options: Any
    ) -> list[Image]: ...
    @overload
    def inpaint(
        self, image: Any, mask: Any, prompt: str | None = ..., *, output: Literal["tensor"], **options: Any
    ) -> Tensor: ...
    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: str | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        keep_embedding: float | None = None,
        crop: Crop = "fit",
        context: float | None = None,
        dilate_by: int = 0,
        feather_by: int = 0,
        resampling: Resampling | None = None,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The picture with the white of the mask painted anew: `num_images` of them, at the picture's own size.

        image: a path, a PIL image or a tensor (3, H, W) in [-1, 1]. mask: a path, PIL image, array or tensor (H, W) of
        the same size (see unclip.masks.read_mask), white or 1 = repaint, black or 0 = keep, grey = blend; `dilate_by`
        and `feather_by` grow it and soften its edge from within, in pixels. What the mask so treated keeps comes out
        as it was, to the bit.
        The model works on a square around the mask (`crop`, `context`: see unclip.frames.frame_around) at the size
        that `size` names, by default its smallest that the square fits into, or its largest.
        prompt, keep_embedding: what the square shall show. 0 takes the prior's embedding of the prompt, 1 the square's
        own CLIP embedding (as it is, with what the mask covers), a number between a point on the great circle
        between them. Default: the prompt's where there is one, else the picture's own. A prompt is given to the
        decoder as a caption too.
        A decoder trained to inpaint does it itself; for others RePaint does (`resampling`).
        options: fields of SampleOptions. Image i is drawn with seed + i.
        Raises UsageError: a mask of another size, black or white everywhere, neither prompt nor embedding to go by, an
        option out of range; ImageError: a file that is no image.
        """
        check_output(output)
        chosen, seeds = self._options(options), _seeds(seed, num_images)
        picture = _picture(image)
        height, width = picture.shape[-2:]
        alpha = check_mask(feather(dilate(read_mask(mask), dilate_by), feather_by), width, height)
        frame = frame_around(mask_box(alpha), width, height, crop, context)
        self.timings = Timings()
        square = _to_float(frame.cut(picture)).to(self.device)[None]
        painter = self._painter(prompt, square, keep_embedding, seeds, chosen, resampling, progress)
        canvases = picture.expand(num_images, -1, -1, -1)
        return _finish(painter(canvases, alpha, frame), output)

    @overload
    def outpaint(
        self, image: Any, prompt: str | None = ..., *, output: Literal["pil"] = ..., **options: Any
    ) -> list[Image]: ...
    @overload
    def outpaint(
        self, image: Any, prompt: str | None = ..., *, output: Literal["tensor"], **options: Any
    ) -> Tensor: ...
    def outpaint(
        self,
        image: Any,
        prompt: str | None = None,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        to: tuple[int, int] | None = None,
        num_images: int = 1,
        seed: int = 0,
        keep_embedding: float | None = None,
        frame: int | None = None,
        overlap: float = 0.5,
        resampling: Resampling | None = None,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The picture continued beyond its edges, by so many pixels or `to` (width, height), then in the middle.

        The model paints square frames of `frame` pixels, outwards from the picture, each reaching by `overlap` of its
        edge into what is there; by default one frame for the whole canvas as long as that is no larger than
        the model's largest size or the picture's shorter edge. The picture itself comes out as it was, to the bit.
        Other arguments as for `inpaint`; the embedding kept is that of the whole picture's central square. Raises
        UsageError: nothing to add, a canvas smaller than the picture or beyond 16384 pixels, an overlap outside
        (0, 1).
        """
        check_output(output)
        chosen, seeds = self._options(options), _seeds(seed, num_images)
        picture = _picture(image)
        height, width = picture.shape[-2:]
        sides = margins(width, height, (left, top, right, bottom), to)
        canvas_width, canvas_height = width + sides[0] + sides[2], height + sides[1] + sides[3]
        box = (sides[0], sides[1], sides[0] + width, sides[1] + height)
        edge = _frame_edge(frame, canvas_width, canvas_height, max(self.sizes[-1], min(width, height)))
        frames = plan_frames(canvas_width, canvas_height, box, edge, overlap)
        unknown = torch.ones(canvas_height, canvas_width)
        unknown[box[1] : box[3], box[0] : box[2]] = 0
        canvas = torch.zeros(3, canvas_height, canvas_width, dtype=torch.uint8)
        canvas[:, box[1] : box[3], box[0] : box[2]] = picture
        self.timings = Timings()
        seen = Frame((width - min(width, height)) // 2, (height - min(width, height)) // 2, min(width, height))
        square = _to_float(seen.cut(picture)).to(self.device)[None]
        painter = self._painter(prompt, square, keep_embedding, seeds, chosen, resampling, progress)
        canvases = canvas.expand(num_images, -1, -1, -1)
        for place in frames:
            if bool((place.cut(unknown, fill=0.0) > 0).any()):
                canvases = painter(canvases, unknown, place)
                unknown = place.paste(unknown, torch.zeros(edge, edge))
        return _finish(canvases, output)

    @overload
    def edit(
        self, image: Any, prompt: str | None = ..., *, output: Literal["pil"] = ..., **options: Any
    ) -> list[Image]: ...
    @overload
    def edit(self, image: Any, prompt: str | None = ..., *, output: Literal["tensor"], **options: Any) -> Tensor: ...
    def edit(
        self,
        image: Any,
        prompt: str | None = None,
        *,
        strength: float = 0.6,
        num_images: int = 1,
        seed: int = 0,
        keep_embedding: float | None = None,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """The picture noised to strength·T and drawn anew for the prompt (SDEdit, Meng et al. 2022).

        The decoder sees the picture's central square at its own resolution, 64 px; the upsamplers do the rest. So
        strength 0 gives the picture back as 64 px hold it, and 1 forgets it: from noise alone, bit for bit what
        `sample` draws with this seed. The decoder's timesteps shrink in proportion, their number stays.
        prompt, keep_embedding, options: as for `inpaint`. Raises UsageError: strength outside 0 … 1, neither prompt
        nor embedding to go by, an option out of range; ImageError: a file that is no image.
        """
        check_output(output)
        chosen, seeds = self._options(options), _seeds(seed, num_images)
        config, count = self.decoder.config, self.decoder.process.timesteps
        spec = config.steps if chosen.decoder_steps is None else chosen.decoder_steps
        steps = sdedit_timesteps(timesteps_from(spec, count), strength, count)
        start = image_pixels(image, config.image_size, self.device)
        seen = image_pixels(image, self.clip.image_size, self.device)
        if len(start) != 1:
            raise UsageError(f"edit takes one image, got {len(start)}")
        self.timings = Timings()
        if not steps:
            held = start if config.latent is None else self.decoder.to_pixels(self._x_start(start))
            pictures = held.expand(num_images, -1, -1, -1)
            caption = None if prompt is None else self._read_by_upsamplers(prompt, num_images)
            return self._finish(self._enlarge(pictures, seeds, chosen, progress, caption), output)
        embedding, text = self._shown(prompt, seen, keep_embedding, seeds, chosen, progress)
        if strength == 1:
            return self._finish(self._render(embedding, text, seeds, chosen, progress), output)
        small = self._x_start(start).expand(num_images, -1, -1, -1)
        sampler = sdedit(small, get_sampler(chosen.sampler or config.sampler))
        own = {**chosen.of_decoder(), "sampler": sampler, "steps": steps, "callback": heard("decoder", progress)}
        pictures = self._timed("decoder", partial(self.decoder.sample, embedding, seeds, text=text, **own))
        return self._finish(self._enlarge(pictures, seeds, chosen, progress, text), output)

    # ---- inside ----------------------------------------------------------------------------------------

    def _x_start(self, images: Tensor) -> Tensor:
        """Pictures of any size as the decoder's process knows them."""
        small = resize(images, self.decoder.config.image_size)
        return self._timed("decoder", lambda: self.decoder.to_x_start(small))  # type: ignore[no-any-return]

    def _shown(
        self,
        prompt: str | None,
        square: Tensor,
        keep: float | None,
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
    ) -> tuple[Tensor, TextFeatures | None]:
        """What the picture shall show: embeddings (B, E) and the caption, for a prompt and a square (1, 3, S, S)."""
        weight = check_kept(prompt, keep)
        texts = [] if prompt is None else [prompt] * len(seeds)
        text = self._timed("clip", lambda: self.embed_text(texts)) if texts else None
        caption = None if text is None else self._caption(texts, text)
        told = None if text is None or weight == 1 else self._prior(text, seeds, options, progress)
        if told is not None and weight == 0:
            return told, caption
        pixels = resize(square, self.clip.image_size)
        own = self._timed("clip", lambda: self.clip.encode_image(pixels, unit_length=self.unit_length))
        own = own.expand(len(seeds), -1)
        return (own if told is None else slerp(told, own, weight)), caption

    def _painter(
        self,
        prompt: str | None,
        square: Tensor,
        keep: float | None,
        seeds: list[int],
        options: SampleOptions,
        resampling: Resampling | None,
        progress: Progress | None,
    ) -> Any:
        """A function (canvases (B, 3, H, W) uint8, mask (H, W), frame) -> canvases with the mask's white in the frame
        painted. The seconds of all its calls add up.
        """
        embedding, text = self._shown(prompt, square, keep, seeds, options, progress)
        way = Resampling() if resampling is None else resampling

        def paint(canvases: Tensor, mask: Tensor, frame: Frame) -> Tensor:
            before, self.timings = self.timings, Timings()
            edge = frame.edge
            size = next((s for s in self.sizes if s >= edge), self.sizes[-1]) if options.size is None else options.size
            given = _to_float(frame.cut(canvases)).to(self.device)
            # Beyond the picture nothing is known; what is painted there is thrown away.
            alpha = frame.cut(mask, fill=1.0).to(self.device)
            known = fill_unknown(given, 1 - alpha)
            drawn = self._repaint_decoder(embedding, text, seeds, known, alpha, options, way, progress)
            for reached in self.sizes:
                if reached > size:
                    break
                drawn = self._enlarge(drawn, seeds, replace(options, size=reached), progress, text)
                # What is known comes from the picture itself, so that the next stage sees no seam. Greys blend once, at
                # the end: to the model they are to be painted.
                drawn = torch.where(repainted_cells(alpha, reached) > 0, drawn, resize(known, reached))
            painted = given + alpha * (resize(drawn, edge) - given)
            for name, seconds in before.seconds.items():
                self.timings.seconds[name] = self.timings.seconds.get(name, 0.0) + seconds
            squares = torch.where(alpha.cpu() > 0, _to_bytes(painted).cpu(), frame.cut(canvases))
            return frame.paste(canvases, squares)

        return paint

    def _repaint_decoder(
        self,
        embedding: Tensor,
        text: TextFeatures | None,
        seeds: list[int],
        given: Tensor,
        mask: Tensor,
        options: SampleOptions,
        way: Resampling,
        progress: Progress | None,
    ) -> Tensor:
        """(B, 3, S, S) at the decoder's size: given (B, 3, E, E) where the mask (E, E) is 0 (in latents about so),
        elsewhere painted.
        """
        config = self.decoder.config
        # In latents a cell is to be painted as soon as one of its pixels is (Avrahami et al. 2023, Blended Latent
        # Diffusion); what lies around the mask comes back from the picture itself in `paint`.
        image, cells = self._x_start(given), repainted_cells(mask, config.unet.image_size)
        own: dict[str, Any] = {**options.of_decoder(), "callback": heard("decoder", progress)}
        if config.inpainting:
            own |= {"inpaint_image": image, "inpaint_mask": cells}
        else:
            own["sampler"] = repaint(image, 1 - cells, jump_length=way.jump_length, resamplings=way.resamplings)
            if options.decoder_steps is None:
                count = len(timesteps_from(config.steps, self.decoder.process.timesteps))
                own["steps"] = config.steps if count >= way.steps else way.steps
        return self._timed("decoder", partial(self.decoder.sample, embedding, seeds, text=text, **own))


def check_kept(prompt: str | None, keep: float | None) -> float:
    """The weight of the picture's own embedding: `keep`, or by default 0 with a prompt and 1 without.

    UsageError: outside 0 … 1; below 1 with no prompt for the rest.
    """
    weight = (1.0 if prompt is None else 0.0) if keep is None else keep
    if not 0 <= weight <= 1:
        raise UsageError(f"keep_embedding is {keep}, expected 0 (the prompt's alone) to 1 (the picture's alone)")
    if prompt is None and weight < 1:
        raise UsageError(f"keep_embedding {weight} needs a prompt for the rest; give one, or keep all of it (1)")
    return weight


def _seeds(seed: int, num_images: int) -> list[int]:
    check_count(num_images)
    return check_seeds([seed + i for i in range(num_images)], num_images)


def _picture(image: Any) -> Tensor:
    """A path, PIL image or tensor in [-1, 1] as 8-bit pixels (3, H, W)."""
    import numpy as np

    from unclip.upscaling import pictures_from

    several = pictures_from(image)
    if len(several) != 1:
        raise UsageError(f"one image is edited at a time, got {len(several)}")
    one = several[0]
    if not isinstance(one, Tensor):
        return torch.from_numpy(np.array(one)).permute(2, 0, 1).contiguous()
    if one.ndim != 3 or one.shape[0] != 3 or not one.is_floating_point() or not one.numel():
        raise UsageError(
            f"an image tensor of shape {tuple(one.shape)} and {one.dtype}; expected (3, H, W), floating point, in "
            "[-1, 1]"
        )
    return _to_bytes(one.detach().cpu())


def _to_float(pixels: Tensor) -> Tensor:
    from unclip.data.images import to_float

    return to_float(pixels)


def _to_bytes(values: Tensor) -> Tensor:
    """[-1, 1] -> 8 bits, rounded to nearest."""
    return values.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _finish(canvases: Tensor, output: str) -> Any:
    if output == "tensor":
        return _to_float(canvases)
    from PIL import Image as Pillow

    return [Pillow.fromarray(one.permute(1, 2, 0).contiguous().numpy()) for one in canvases]


def _frame_edge(frame: int | None, width: int, height: int, largest: int) -> int:
    if frame is None:
        return min(max(width, height), largest)
    if not 2 <= frame <= max(width, height):
        raise UsageError(f"frame is {frame}, expected 2 pixels to the canvas's longer edge, {max(width, height)}")
    return frame

