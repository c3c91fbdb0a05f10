"""The typer application: its commands and the options that stand before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperCommand

from unclip.cli import convert, draw, edit, evaluate, film, inspect, manipulate, probe
from unclip.cli.drafts import drafts
from unclip.cli.embed import embed
from unclip.cli.fit_pca import fit_pca
from unclip.cli.groups import ungrouped
from unclip.cli.merge import merge
from unclip.cli.mix import mix
from unclip.cli.plan import params, plan
from unclip.cli.plot import plot
from unclip.cli.push import push
from unclip.cli.runs import runs
from unclip.cli.several import several
from unclip.cli.statistics import statistics
from unclip.cli.suite import pairs, prior_metrics, suite, tally
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


Panel = tuple[str, dict[Callable[..., None], type[TyperCommand] | None]]

# By panel of `unclip --help`, each command with the class that reads options of several values.
_PANELS: tuple[Panel, ...] = (
    (
        "Pictures",
        {
            draw.sample: None,
            manipulate.variations: several(numbers=("--eta-sheet",)),
            draw.decode: None,
            manipulate.reconstruct: None,
            film.interpolate: None,
            film.textdiff: None,
            mix: several(texts=("--mix",)),
        },
    ),
    (
        "Editing",
        {edit.inpaint: None, edit.outpaint: None, edit.edit: None, restore: None, upscale: None},
    ),
    (
        "What the stages know",
        {
            probe.pca: several(numbers=("--dims",)),
            probe.typographic: several(texts=("--texts", "--labels")),
            probe.compare_conditioning: None,
            probe.guidance_sheet: several(numbers=("--scales", "--prior-scales")),
            fit_pca: None,
            statistics: None,
        },
    ),
    (
        "How good it is",
        {
            evaluate.eval_: several(texts=("--metrics",)),
            evaluate.sweep: several(numbers=("--scales", "--steps"), texts=("--etas", "--samplers")),
            evaluate.memorisation: None,
            suite: several(texts=("--categories",)),
            prior_metrics: None,
            pairs: None,
            tally: None,
        },
    ),
    (
        "Models and training",
        {
            embed: None,
            drafts: None,
            inspect.bundle: None,
            merge: None,
            convert.convert: None,
            convert.export: None,
            inspect.info: None,
            params: None,
            plan: None,
            runs: None,
            plot: None,
            push: None,
        },
    ),
)

for _panel, _commands in _PANELS:
    for _command, _cls in _commands.items():
        app.command(cls=_cls, rich_help_panel=_panel)(ungrouped(_command))
