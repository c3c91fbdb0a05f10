"""The command merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unclip.cli import options as opt


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The bundled model 'emoji', a folder, or a Hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="DIR[:WEIGHT]…", help="Folders of low-rank adapters, each with its weight.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    name: Annotated[str | None, typer.Option(help="The new model's name (default: the folder's).")] = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Type of the stored weights.")
    ] = "float16",
    overwrite: opt.Overwrite = False,
) -> None:
    """Merge low-rank adapters into a model: a model folder of its own, as large as the one it is made of.

    `unclip sample --adapter DIR` draws with adapters without this.
    """
    from unclip.assemble import merge as merge_adapters

    merge_adapters(out, model, adapters, name, dtype, overwrite)
    print(out)
