"""The typer application: its commands and the options that stand before them."""

from __future__ import annotations

from typing import Annotated

import typer

from unclip.cli import draw, edit, film, inspect, manipulate, probe
from unclip.cli.embed import embed
from unclip.cli.fit_pca import fit_pca
from unclip.cli.merge import merge
from unclip.cli.mix import mix
from unclip.cli.plan import params, plan
from unclip.cli.plot import plot
from unclip.cli.runs import runs
from unclip.cli.several import several
from unclip.cli.statistics import statistics
from unclip.cli.upscale import restore, upscale

app = typer.Typer(
    name="unclip",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from unclip import __version__

        typer.echo(f"unclip {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def unclip(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and library messages; also after the command.")
    ] = False,
) -> None:
    """unCLIP (DALL·E 2): pictures from prompts, images and CLIP embeddings.

    Try: unclip sample --prompt pizza --size 64
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (
    draw.sample,
    manipulate.reconstruct,
    film.interpolate,
    film.textdiff,
    draw.decode,
    upscale,
    edit.inpaint,
    edit.outpaint,
    edit.edit,
    restore,
    embed,
    inspect.bundle,
    merge,
    inspect.info,
    statistics,
    params,
    plan,
    runs,
    plot,
):
    app.command()(command)

app.command(cls=several(numbers=("--eta-sheet",)))(manipulate.variations)
app.command()(fit_pca)
app.command(cls=several(texts=("--mix",)))(mix)
app.command(cls=several(numbers=("--dims",)))(probe.pca)
app.command(cls=several(texts=("--texts", "--labels")))(probe.typographic)
app.command()(probe.compare_conditioning)
app.command(cls=several(numbers=("--scales", "--prior-scales")))(probe.guidance_sheet)
