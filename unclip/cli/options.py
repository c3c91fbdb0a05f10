"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from unclip.config import DataConfig

LARGEST_SEED = 2**32 - 1
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".tga", ".ico", ".jp2")


class Dtype(str, Enum):
    """Precision of the networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Reranker(str, Enum):
    """What chooses the best of many pictures."""

    clip = "clip"


def pixels(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise typer.BadParameter(f"{text!r} is no edge in pixels; the bundled model makes 64, 256 and 1024")
    return int(text)


def steps_option(text: str) -> Any:
    from unclip.config import check_steps  # pydantic, which `--help` does without

    try:
        return check_steps(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


def place(text: str) -> Path:
    """Where pictures go. An empty text would be the current folder, and a dash a folder of that name."""
    if not text.strip():
        raise UsageError("--out is empty; name a .png file or a folder, such as . for the current one")
    if text == "-":
        raise UsageError("--out - asks for stdout, where pictures are not written; name a .png file or a folder")
    return Path(text)


STEPS = "N|ddimN|T,T,…"
_SAMPLING = "How it samples (default: the model's own)"
_OUTPUT = "What is written"

NumImages = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Pictures of each.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Picture i is drawn with seed + i.")]
Size = Annotated[
    int | None,
    typer.Option(
        parser=pixels, metavar="64|256|1024", help="Edge in pixels (default: the model's largest)."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|DIR|HUB-ID", help="The bundled model 'emoji', a folder, or a Hub id user/name."
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR[:WEIGHT]", help="A folder of low-rank adapters, merged with this weight (default: 1); repeatable."
    ),
]
Token = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Learned tokens that prompts may mention, as '<name>'; repeatable."),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where it runs; auto takes CUDA if there is one.")
]
Precision = Annotated[
    Dtype, typer.Option("--dtype", metavar="|".join(Dtype.__members__), help="Precision of the networks.")
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="The decoder's guidance scale; 1 is none.", rich_help_panel=_SAMPLING),
]
GuidanceText = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="A scale of its own for what the prompt adds to the image embedding (default: --guidance for both).",
        rich_help_panel=_SAMPLING,
    ),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Where the decoder is guided, as fractions of its timesteps, such as 0.2 0.8 (default: all).",
        rich_help_panel=_SAMPLING,
    ),
]
GuidanceRescale = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="How far guidance's excess of contrast is taken back, 0 to 1.", rich_help_panel=_SAMPLING
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The decoder's sampler: ddim, ddpm, dpmpp_2m, unipc, plms, pndm or analytic.",
        rich_help_panel=_SAMPLING,
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(min=0, help="Noise of the decoder's ddim steps; 0 is none.", rich_help_panel=_SAMPLING),
]
PriorGuidance = Annotated[
    float | None,
    typer.Option(min=0, help="The prior's guidance scale; 1 is none.", rich_help_panel=_SAMPLING),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help="What guidance moves away from; needs a guidance scale above 1, of prior or decoder.",
        rich_help_panel=_SAMPLING,
    ),
]
NegativeEmbedding = Annotated[
    bool,
    typer.Option(
        "--negative-embedding",
        help="The decoder moves away from the negative prompt's image embedding too.",
        rich_help_panel=_SAMPLING,
    ),
]
Rerank = Annotated[
    Reranker | None,
    typer.Option(
        metavar="clip",
        help="Keep the pictures of each prompt that CLIP finds closest to it, best first.",
        rich_help_panel=_SAMPLING,
    ),
]
Keep = Annotated[
    int | None,
    typer.Option(min=1, help="With --rerank: how many of each are kept (default: 1).", rich_help_panel=_SAMPLING),
]
PriorSteps = Annotated[
    Any,
    typer.Option(
        parser=steps_option,
        metavar=STEPS,
        help="Steps of the prior: 64, ddim50, or timesteps.",
        rich_help_panel=_SAMPLING,
    ),
]
DecoderSteps = Annotated[
    Any,
    typer.Option(parser=steps_option, metavar=STEPS, help="Steps of the decoder.", rich_help_panel=_SAMPLING),
]
UpsamplerSteps = Annotated[
    Any,
    typer.Option(parser=steps_option, metavar=STEPS, help="Steps of each upsampler.", rich_help_panel=_SAMPLING),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        metavar="MIB",
        help="Most memory of an upsampler for a picture; slower, same picture.",
        rich_help_panel=_SAMPLING,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        parser=place,
        metavar="PATH",
        help="A .png file for one picture, else a folder (default: outputs).",
        rich_help_panel=_OUTPUT,
    ),
]
Grid = Annotated[
    bool, typer.Option("--grid", help="Also write all pictures as one grid.", rich_help_panel=_OUTPUT)
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object a picture, and nothing else.", rich_help_panel=_OUTPUT
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=_OUTPUT)]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures drawn together; changes memory, not pictures.")]
DataChanges = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of a run's data section.")
]


def own_device(name: str) -> Any:
    """The device of this name; with auto, of several processes on a machine with GPUs each has its own."""
    from unclip.inputs import resolve_device

    local, place = os.environ.get("LOCAL_RANK"), resolve_device(name)
    return resolve_device(f"cuda:{local}") if name == "auto" and place.type == "cuda" and local is not None else place


def data_config(source: dict[str, Any], size: int, changes: Sequence[str] | None) -> DataConfig:
    """The data section of `source` with --set's changes, its pictures whole and of `size` pixels. UsageError: --set
    asks for others.
    """
    from unclip.config import DataConfig, load_overrides

    config = load_overrides(DataConfig, {**source, "image_size": size}, list(changes or []), origin="the data")
    if config.image_size != size or config.crop_size is not None:
        raise UsageError(f"pictures are taken whole and at {size} px here; leave image_size and crop_size out of --set")
    return config


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: what is not given is the model's own default."""
    return {name: value for name, value in options.items() if value is not None}


def places(folders: Sequence[str]) -> str:
    """Folders or files, and weights behind them, as a picture may tell of them: without where they lie."""
    return ", ".join("/".join(Path(one).parts[-2:]) for one in folders)


def kept_of(rerank: Reranker | None, keep: int | None, drawn: int) -> int | None:
    """Pictures of each prompt that reranking keeps; None without it. UsageError: --keep alone, or more than drawn."""
    if rerank is None:
        if keep is not None:
            raise UsageError(f"--keep {keep} chooses the best of several pictures; add --rerank clip")
        return None
    kept = 1 if keep is None else keep
    if kept > drawn:
        raise UsageError(f"--keep {kept} is more than the {drawn} pictures drawn of each prompt; raise --num-images")
    return kept


def picture_named(text: str) -> Path | None:
    """The picture's file that a text names, None where it is a prompt. UnclipError: it ends as a picture's name does
    and there is no such file, or it is a folder's path; drawn as a prompt it would be something else than was meant.
    """
    file = Path(text).expanduser()
    try:
        if file.is_file():
            return file
    except OSError:  # a prompt too long for a file's name
        return None
    if file.suffix.lower() in _PICTURES:
        raise UnclipError(f"there is no image file at {text}; a prompt does not end in {file.suffix}")
    if os.sep in text and file.is_dir():
        raise UnclipError(f"{text} is a folder; name a picture's file, or a prompt")
    return None


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines and #-comments are skipped. UnclipError: unreadable or
    empty.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnclipError(f"the prompts file {file} is not UTF-8 text") from error
    except OSError as error:
        raise UnclipError(f"the prompts file {file} cannot be read: {error.strerror or error}") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UnclipError(f"the prompts file {file} holds no prompt; expected one a line")
    return prompts
