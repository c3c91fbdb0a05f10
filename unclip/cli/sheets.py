"""What the commands that write one sheet of pictures share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.groups import Place
from unclip.cli.output import PictureWriter, bare_name
from unclip.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.pipeline import UnCLIP

_CELL = 256

Cell = Annotated[
    int | None,
    typer.Option(
        "--size",
        parser=opt.pixels,
        metavar="64|256|1024",
        help=f"Edge of each picture in pixels (default: the model's largest up to {_CELL}).",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=opt.LARGEST_SEED, help="The noise; column i is drawn with seed + i.")]
Columns = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Pictures of each, with seeds of their own.")]
Prompt = Annotated[str | None, typer.Argument(help="What the pictures show.", show_default=False)]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The same, named as in `unclip sample`.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]


def one_prompt(argument: str | None, option: str | None) -> str:
    """The prompt of a sheet, which stands by itself or behind --prompt. UsageError: in neither place, or in both."""
    given = [text for text in (argument, option) if text is not None]
    if len(given) != 1:
        raise UsageError(f"a sheet is of one prompt, got {len(given)}; name one, such as --prompt 'red apple'")
    return given[0]


@dataclass(frozen=True)
class Sheets(Place):
    """Of the commands that write one sheet."""

    seed: Seed = 0
    size: Cell = None
    json_lines: Json = False


@dataclass(frozen=True)
class Sheet:
    """How a sheet is drawn and written; made by `prepare` before anything heavy is loaded."""

    command: str
    system: UnCLIP
    writer: PictureWriter
    asked: Sheets
    size: int
    options: dict[str, Any]

    def save(self, sheet: Image, label: str, shown: dict[str, Any], told: dict[str, Any] | None = None) -> None:
        """Write the sheet and tell where it is. `shown` goes into the PNG, and with `told` into the JSON
        line; of `told` the PNG has the picture's name alone."""
        from unclip import __version__

        text = {
            "command": self.command,
            "seed": str(self.asked.seed),
            "model": self.system.name,
            "size": str(self.size),
            "unclip": __version__,
            "dtype": self.asked.dtype.value,
            **{key: value if isinstance(value, str) else json.dumps(value) for key, value in shown.items()},
        }
        if told and "image" in told:
            text["image"] = bare_name(told["image"])
        if self.options:
            text["options"] = json.dumps(self.options)
        path = self.writer.save(sheet, label, self.asked.seed, text)
        body = {
            "path": str(path),
            "seed": self.asked.seed,
            "size": self.size,
            "model": self.system.name,
            "seconds": {stage: round(s, 4) for stage, s in self.system.timings.seconds.items()},
            **shown,
            **(told or {}),
        }
        print(json.dumps(body) if self.asked.json_lines else path, flush=True)


def prepare(command: str, asked: Sheets, options: dict[str, Any]) -> Sheet:
    """See that the sheet can be written, then load the model up to the size of its pictures."""
    writer, size = asked.writer(1), asked.size
    from unclip.bundle import read_manifest, resolve_model
    from unclip.parts import bundle_sizes
    from unclip.pipeline import UnCLIP

    folder = resolve_model(asked.model)
    parts = read_manifest(folder)["parts"]
    if size is None and "decoder" in parts:
        sizes = bundle_sizes(folder, parts)
        size = max((edge for edge in sizes if edge <= _CELL), default=sizes[0])
    system = UnCLIP.from_pretrained(folder, device=asked.device, dtype=asked.torch_dtype, size=size)
    return Sheet(command, system, writer, asked, system.check_size(size), options)


def fitted(image: Image, edge: int) -> Image:
    """A copy of a picture of any shape that fills a square cell as far as it goes."""
    from PIL import ImageOps

    return ImageOps.contain(image, (edge, edge))
