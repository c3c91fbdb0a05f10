"""The commands that draw pictures: sample, decode."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.groups import BATCH, Decoding, Drawing, Sampling, Series, Solving
from unclip.cli.output import PictureWriter, bare_name, grid_columns, thumbnail
from unclip.cli.progress import Bars
from unclip.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.pipeline import UnCLIP


_FILES = ("embeddings", "image", "latents", "mask")
"""What a job's record says that is a file's path."""


@dataclass(frozen=True)
class Job:
    """One picture to draw: what its file is called after, its seed, and what its record says beside the
    common keys.
    """

    label: str
    seed: int
    prompt: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all drawing commands share."""

    drawing: Drawing
    options: dict[str, Any]  # of UnCLIP.sample and its siblings
    batch_size: int = BATCH
    columns: int = 1  # of the grid
    grid: bool = False
    command: str = ""

    @classmethod
    def of(cls, command: str, series: Series, options: dict[str, Any], columns: int | None = None) -> Setting:
        return cls(series, options, series.batch_size, columns or series.num_images, series.grid, command)

    def load(self) -> UnCLIP:
        """The model, without the upsamplers that the size does not need."""
        from unclip.pipeline import UnCLIP

        drawing = self.drawing
        return UnCLIP.from_pretrained(
            drawing.model,
            device=drawing.device,
            dtype=drawing.torch_dtype,
            size=self.options.get("size"),
            adapters=drawing.adapter or (),
            tokens=drawing.token or (),
        )


Draw = Callable[[Sequence[Job], Bars], "list[Image]"]


def sample(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What the picture shows; repeatable.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; #-comments are skipped.")
    ] = None,
    size: opt.Size = None,
    negative_prompt: opt.NegativePrompt = None,
    negative_embedding: opt.NegativeEmbedding = False,
    rerank: opt.Rerank = None,
    keep: opt.Keep = None,
    guidance_text: opt.GuidanceText = None,
    *,
    options: Sampling,
    solving: Solving,
    drawing: Series,
) -> None:
    """Draw pictures for prompts.

    The bundled model knows the names of emoji, such as pizza, red apple or rainbow: `unclip info --json` lists those it
    draws best under model.example_prompts. The same seed gives the same picture, whatever else is drawn beside it.
    """
    prompts = [*(prompt or []), *(opt.read_prompts(prompts_file) if prompts_file is not None else [])]
    if not prompts:
        raise UsageError("no prompt given; pass --prompt 'pizza' or --prompts-file FILE")
    _check_prompts(prompts)
    kept = opt.kept_of(rerank, keep, drawing.num_images)
    away = opt.given(negative_prompt=negative_prompt, negative_embedding=negative_embedding or None)
    if negative_embedding and negative_prompt is None:
        raise UsageError("--negative-embedding is of a negative prompt, and none is given; add --negative-prompt")
    writer = drawing.writer(len(prompts) * (kept or drawing.num_images))
    sampling = options.given(size=size, guidance_text=guidance_text, **solving.given())
    shown = {**sampling, **away}
    setting = Setting.of("sample", drawing, shown, columns=kept)
    system = setting.load()
    if kept:
        produce_best(prompts, drawing.num_images, kept, drawing.seed, {**sampling, **away}, system, setting, writer)
        return
    jobs = [Job(text, drawing.seed + i, prompt=text) for text in prompts for i in range(drawing.num_images)]

    def draw(batch: Sequence[Job], bars: Bars) -> list[Image]:
        texts = [job.prompt or "" for job in batch]
        return system.sample(texts, seed=[job.seed for job in batch], progress=bars, **sampling, **away)

    produce(jobs, draw, system, setting, writer)


def decode(
    embeddings: Annotated[
        Path, typer.Argument(help="A .npy file of CLIP image embeddings, (N, E) or (E,) floats.")
    ],
    size: opt.Size = None,
    *,
    options: Decoding,
    solving: Solving,
    drawing: Series,
) -> None:
    """Draw pictures straight from CLIP image embeddings, such as `unclip embed` or your own model writes."""
    from unclip.inputs import check_embeddings, read_embeddings

    array = read_embeddings(embeddings)
    writer = drawing.writer((1 if array.ndim == 1 else len(array)) * drawing.num_images)
    sampling = options.given(size=size, **solving.given())
    setting = Setting.of("decode", drawing, sampling)
    system = setting.load()
    rows = check_embeddings(array, system.clip.embedding_dim, unit_length=system.unit_length)
    jobs = [
        Job(f"{embeddings.stem} {row}", drawing.seed + i, extra={"embeddings": str(embeddings), "row": row})
        for row in range(len(rows))
        for i in range(drawing.num_images)
    ]

    def draw(batch: Sequence[Job], bars: Bars) -> list[Image]:
        chosen = rows[[job.extra["row"] for job in batch]]
        return system.decode(chosen, seed=[job.seed for job in batch], progress=bars, **sampling)

    produce(jobs, draw, system, setting, writer)


def produce(
    jobs: Sequence[Job], draw: Draw, system: UnCLIP, setting: Setting, writer: PictureWriter
) -> None:
    """Draw the jobs batch by batch, write each picture and tell of it on stdout."""
    small: list[Image] = []
    starts = range(0, len(jobs), setting.batch_size)
    with Bars(setting.drawing.quiet) as bars:
        for number, start in enumerate(starts):
            batch = jobs[start : start + setting.batch_size]
            bars.batch(number + 1, len(starts))
            images = draw(batch, bars)
            bars.close()
            # The stages work on the whole batch at once: a picture's share of their time.
            seconds = {stage: round(s / len(batch), 4) for stage, s in system.timings.seconds.items()}
            for job, image in zip(batch, images, strict=True):
                path = writer.save(image, job.label, job.seed, _metadata(job, image, system.name, setting))
                _tell(_record(job, image, path, system.name, seconds) if setting.drawing.json_lines else str(path))
            if setting.grid:
                small += [thumbnail(image) for image in images]
    _write_grid(small, setting, writer)


def produce_best(
    prompts: Sequence[str],
    drawn: int,
    kept: int,
    seed: int,
    options: dict[str, Any],
    system: UnCLIP,
    setting: Setting,
    writer: PictureWriter,
) -> None:
    """Draw many pictures of each prompt, and write the best by CLIP, each with its score and its place."""
    small: list[Image] = []
    with Bars(setting.drawing.quiet) as bars:
        for number, text in enumerate(prompts):
            bars.batch(number + 1, len(prompts))
            best = system.sample_best(
                text, num_images=drawn, keep=kept, seed=seed, batch_size=setting.batch_size, progress=bars, **options
            )
            bars.close()
            seconds = {stage: round(s / kept, 4) for stage, s in system.timings.seconds.items()}
            for one in best:
                place = {"rank": one.rank, "clip_score": round(one.score, 6), "drawn": drawn}
                job = Job(f"{text} best {one.rank}", one.seed, prompt=text, extra=place)
                path = writer.save(
                    one.image, job.label, job.seed, _metadata(job, one.image, system.name, setting)
                )
                _tell(_record(job, one.image, path, system.name, seconds) if setting.drawing.json_lines else str(path))
                if setting.grid:
                    small.append(thumbnail(one.image))
    _write_grid(small, setting, writer)


def _write_grid(small: list[Image], setting: Setting, writer: PictureWriter) -> None:
    """All pictures as one, where asked for."""
    if setting.grid:
        path = writer.save_grid(small, grid_columns(len(small), setting.columns))
        print(path, file=sys.stderr if setting.drawing.json_lines else sys.stdout)


def _record(job: Job, image: Image, path: Path, name: str, seconds: dict[str, float]) -> str:
    body = {
        "path": str(path),
        "prompt": job.prompt,
        "seed": job.seed,
        "width": image.width,
        "height": image.height,
        "model": name,
        "seconds": seconds,
        **job.extra,
    }
    return json.dumps(body)


def _metadata(job: Job, image: Image, name: str, setting: Setting) -> dict[str, str]:
    """What the PNG itself says about how it came to be; no paths, since pictures travel."""
    from unclip import __version__

    edge = image.width
    text = {
        "command": setting.command,
        "prompt": job.prompt or "",
        "seed": str(job.seed),
        "model": name,
        "size": str(edge) if edge == image.height else f"{edge}x{image.height}",
        "unclip": __version__,
        "dtype": setting.drawing.dtype.value,
        **setting.drawing.told(),
    }
    # The size asked for is the picture's own, but where a square of it is painted.
    chosen = {
        key: value for key, value in setting.options.items() if key != "size" or (value, value) != image.size
    }
    for key, value in job.extra.items():
        if key in _FILES:
            text[key] = bare_name(value)
        elif key not in chosen:
            text[key] = value if isinstance(value, str) else json.dumps(value)
    return {**text, "options": json.dumps(chosen)} if chosen else text


def _tell(line: str) -> None:
    print(line, flush=True)


def _check_prompts(prompts: list[str]) -> None:
    """What can be said against prompts before anything heavy is imported."""
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UsageError(f"prompt {number + 1} is empty; say what the picture shows, such as 'pizza'")
