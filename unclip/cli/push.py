"""The command push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options as opt


def push(
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="The repository; it is made when it is new.")],
    model: opt.Model = "emoji",
    revision: Annotated[str | None, typer.Option(help="A branch of the repository (default: main).")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The weights' licence, where the model does not tell it.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="What the model was trained on, in words.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A data set on the Hub that it was trained on; repeatable.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help='A JSON file of measured numbers for the card: {"FID": 12.3}.')
    ] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be uploaded, and leave it.")] = False,
) -> None:
    """Upload a model folder to the Hugging Face Hub, with a model card.

    Uses the token of `hf auth login` or HF_TOKEN.
    """
    from unclip.publishing import push_to_hub, read_metrics

    where = push_to_hub(
        model,
        to,
        revision=revision,
        private=private,
        license=license_name,
        data=data,
        datasets=dataset or (),
        metrics=None if metrics is None else read_metrics(metrics),
        message=message,
        dry_run=dry_run,
    )
    print(where)
