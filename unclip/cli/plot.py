"""`unclip plot`: the curves of one run or several, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options as opt
from unclip.cli.output import check_free, check_writable
from unclip.errors import UsageError


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders, or metrics.jsonl files.")],
    out: Annotated[Path, typer.Option(help="The picture, a .png file.")] = Path("curves.png"),
    keys: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="What to draw, such as loss or cos_*; repeat it (default: everything)."),
    ] = None,
    smooth: Annotated[
        float,
        typer.Option(min=0, max=0.999, help="0 draws values as they are; 0.9 averages over about ten lines."),
    ] = 0.0,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic axes for losses and gradient norms.")] = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Draw curves from metrics.jsonl: a panel a metric, those that belong together in one.

    Several runs are drawn into the same panels.
    """
    from unclip.curves import draw_curves, read_curves

    if out.suffix.lower() != ".png":
        raise UsageError(f"--out is {out}; expected a file that ends in .png")
    check_free(out, overwrite)
    check_writable(out.parent)
    curves = [read_curves(run) for run in runs]
    names = [key for text in keys or [] for key in text.replace(",", " ").split()]
    draw_curves(curves, out, names, smooth=smooth, logarithmic=log)
    print(out)
