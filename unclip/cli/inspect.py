"""The commands that draw nothing: bundle, info."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unclip.cli import options as opt
from unclip.errors import UnclipError


def bundle(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    clip: Annotated[Path, typer.Option(help="The CLIP: a folder in open_clip's layout.")],
    decoder: Annotated[Path, typer.Option(help="The decoder.")],
    prior: Annotated[Path | None, typer.Option(help="The prior; without one there are no prompts.")] = None,
    upsampler_256: Annotated[
        Path | None, typer.Option("--upsampler-256", help="The upsampler 64 to 256.")
    ] = None,
    upsampler_1024: Annotated[
        Path | None, typer.Option("--upsampler-1024", help="The upsampler 256 to 1024.")
    ] = None,
    pca: Annotated[
        Path | None, typer.Option(help="The CLIP's principal components, from `unclip fit-pca --out`.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name (default: the folder's).")] = None,
    model_version: Annotated[str | None, typer.Option(help="The model's version.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The weights' licence, such as Apache-2.0.")
    ] = None,
    example_prompts: Annotated[
        Path | None, typer.Option(help="Prompts that the model knows, one a line.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="A model card, kept as README.md.")] = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Type of the stored weights.")
    ] = "float16",
    overwrite: opt.Overwrite = False,
) -> None:
    """Put trained parts together into one model folder, which --model takes.

    Weights are converted and split into files below 16 MiB, and the model is loaded once to see that it fits.
    """
    from unclip.assemble import assemble

    parts = {
        "clip": clip,
        "prior": prior,
        "decoder": decoder,
        "upsampler_256": upsampler_256,
        "upsampler_1024": upsampler_1024,
        "pca": pca,
    }
    details: dict[str, Any] = {
        "name": name or out.absolute().name,
        "version": model_version,
        "license": license_name,
    }
    if example_prompts is not None:
        details["example_prompts"] = opt.read_prompts(example_prompts)
    given = {part: folder for part, folder in parts.items() if folder is not None}
    assemble(
        out,
        given,
        {key: value for key, value in details.items() if value is not None},
        card,
        dtype,
        overwrite,
    )
    print(out)


def info(
    model: opt.Model = "emoji",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell about this installation and a model.

    Versions, devices, the model's parts, sizes, default steps, and the prompts it knows (example_prompts).
    """
    from unclip.describe import describe_environment, describe_model

    body: dict[str, Any] = describe_environment()
    failure: UnclipError | None = None
    try:
        body["model"] = describe_model(model)
    except UnclipError as error:  # the rest is what a bug report needs
        body["model"], failure = None, error
    print(json.dumps(body, indent=2, ensure_ascii=True) if json_output else _readable(body))
    if failure is not None:
        raise failure


def _in_latents(facts: dict[str, Any]) -> str:
    """Of a part in latents, whose they are."""
    told = facts.get("latents")
    if told is None:
        return ""
    own = f"its own, {told['parameters'] / 1e6:.2f} M parameters" if told["carried"] else told["name"]
    return f"; in latents of {told['channels']} channels, {told['factor']} px a side, of an autoencoder ({own})"


def _readable(body: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in body["packages"].items())
    lines = [
        f"unclip    {body['unclip']}, Python {body['python']}, {body['platform']}",
        f"packages  {packages}",
        f"devices   {', '.join(body['devices'])}",
    ]
    model = body["model"]
    if model is None:
        return "\n".join(lines)
    lines.append(f"model     {model['name']}, {model['bytes'] / 1e6:.1f} MB in {model['folder']}")
    lines.append(f"sizes     {', '.join(str(size) for size in model['sizes'])} px")
    for part, facts in model["parts"].items():
        defaults = ", ".join(f"{key} {value}" for key, value in facts["defaults"].items())
        numbers = f"{facts['parameters'] / 1e6:7.2f} M parameters, {facts['bytes'] / 1e6:6.1f} MB"
        if facts["missing"]:
            numbers = f"cannot be used: {', '.join(facts['missing'])} is missing"
        lines.append(f"  {part:<15} {numbers}{'; ' + defaults if defaults else ''}{_in_latents(facts)}")
    known = model["example_prompts"]
    if known:
        shown = ", ".join(known[:12])
        more = f", … ({len(known)} are named; --json lists them)" if len(known) > 12 else ""
        lines.append(f"prompts   {shown}{more}")
    return "\n".join(lines)
