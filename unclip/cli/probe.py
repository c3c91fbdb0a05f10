"""The commands that look into CLIP's space: pca, typographic, compare-conditioning, guidance-sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli import options as opt
from unclip.cli.groups import Decoding, Sampling, Upsampling
from unclip.cli.progress import Bars
from unclip.cli.sheets import Columns, Prompt, PromptOption, Sheets, fitted, one_prompt, prepare

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 4
"""Labels whose probabilities stand beside a picture."""


def pca(
    image: Annotated[Path, typer.Argument(help="The picture whose embedding is rebuilt.")],
    dims: Annotated[
        list[int] | None,
        typer.Option(
            metavar="K K …", help="Principal components kept (default: the paper's, as far as the model has them)."
        ),
    ] = None,
    *,
    sampling: Decoding,
    asked: Sheets,
) -> None:
    """Rebuild a picture's embedding from its first principal components, and draw each (unCLIP, Figure 7).

    One sheet: the picture, then more components from cell to cell, all from the same noise. The model must hold a PCA,
    which `unclip fit-pca` measures; the bundled model has one of 256 components.
    """
    from unclip.data.images import load_image
    from unclip.data.lettering import labelled_sheet

    picture = load_image(image)
    options = sampling.given()
    sheet = prepare("pca", asked, options)
    with Bars(asked.quiet) as bars:
        found = sheet.system.pca(picture, dims, seed=asked.seed, size=sheet.size, progress=bars, **options)
    named = [f"{number}: {error:.0%} off" for number, error in zip(found.dims, found.errors, strict=True)]
    row = [fitted(picture, sheet.size), *found.images]
    shown = {
        "dims": list(found.dims),
        "errors": [round(error, 6) for error in found.errors],
        "cosines": [round(cosine, 6) for cosine in found.cosines],
    }
    told = {"image": str(image)}
    sheet.save(labelled_sheet([row], None, [image.stem, *named]), f"{image.stem} pca", shown, told)


def typographic(
    image: Annotated[Path, typer.Argument(help="The picture to write on.")],
    texts: Annotated[list[str], typer.Option("--texts", metavar="TEXT TEXT …", help="What is written on it.")],
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL LABEL …",
            help="What CLIP chooses from (default: the texts and the prompts that the model knows).",
        ),
    ] = None,
    template: Annotated[str, typer.Option(help="A caption for a label, such as 'a photo of a {}'.")] = "{}",
    width: Annotated[float, typer.Option(help="Most of the picture's width that the text takes.")] = 0.7,
    height: Annotated[float, typer.Option(help="Where its middle lies: 0 top, 1 bottom.")] = 0.5,
    font: Annotated[Path | None, typer.Option(help="A TrueType or OpenType file; Pillow's has few letters.")] = None,
    num_images: Columns = 3,
    *,
    sampling: Decoding,
    asked: Sheets,
) -> None:
    """Write on a picture, and see what CLIP takes it for (typographic attacks; unCLIP, Figure 6).

    One sheet: a row for the picture as it is and one for each text; in it the picture, CLIP's most probable labels, and
    variations.
    """
    from unclip.data.images import load_image
    from unclip.data.lettering import check_letters, labelled_sheet

    picture = load_image(image)
    for text in texts:
        check_letters(text, font)  # before the model is loaded
    options = sampling.given()
    sheet = prepare("typographic", asked, options)
    with Bars(asked.quiet) as bars:
        attacks = sheet.system.typographic(
            picture,
            texts,
            labels=labels,
            template=template,
            num_images=num_images,
            seed=asked.seed,
            width=width,
            height=height,
            font=font,
            size=sheet.size,
            progress=bars,
            **options,
        )
    rows: list[list[Image | str | None]] = []
    for attack in attacks:
        likeliest = list(attack.probabilities.items())[:_SHOWN]
        panel = "\n".join(f"{label} {share:.1%}" for label, share in likeliest)
        rows.append([fitted(attack.image, sheet.size), panel, *attack.variations])
    body = [
        {"text": attack.text, "probabilities": {name: round(p, 6) for name, p in attack.probabilities.items()}}
        for attack in attacks
    ]
    shown = {"texts": texts}
    names = ["picture", "CLIP says", *["variation"] * num_images]
    told = {"image": str(image), "rows": body}
    sheet.save(labelled_sheet(rows, None, names), f"{image.stem} typographic", shown, told)


def compare_conditioning(
    words: Prompt = None,
    named: PromptOption = None,
    num_images: Columns = 4,
    guidance_text: opt.GuidanceText = None,
    *,
    sampling: Sampling,
    asked: Sheets,
) -> None:
    """Draw a prompt with three conditions of the decoder (unCLIP, Figure 8): what the prior is good for.

    One sheet of three rows from the same noise: the caption alone; caption, and CLIP's text embedding in place of an
    image embedding; caption, and the prior's image embedding.
    """
    from unclip.data.lettering import labelled_sheet

    prompt = one_prompt(words, named)
    options = sampling.given(guidance_text=guidance_text)
    sheet = prepare("compare-conditioning", asked, options)
    with Bars(asked.quiet) as bars:
        found = sheet.system.compare_conditioning(
            prompt, num_images=num_images, seed=asked.seed, size=sheet.size, progress=bars, **options
        )
    scores = {
        name: [round(score, 4) for score in sheet.system.clip_scores(images, prompt).tolist()]
        for name, images in found.items()
    }
    drawn = labelled_sheet(list(found.values()), list(found))
    sheet.save(drawn, f"{prompt} conditioning", {"prompt": prompt}, {"clip_scores": scores})


def guidance_sheet(
    words: Prompt = None,
    named: PromptOption = None,
    scales: Annotated[
        list[float] | None, typer.Option(metavar="S S …", help="The decoder's scales (default: 1 2 3 4).")
    ] = None,
    prior_scales: Annotated[
        list[float] | None,
        typer.Option(metavar="S S …", help="The prior's scales, a row each (default: the model's own)."),
    ] = None,
    num_images: Columns = 1,
    guidance_text: opt.GuidanceText = None,
    prior_steps: opt.PriorSteps = None,
    decoder_steps: opt.DecoderSteps = None,
    *,
    sampling: Upsampling,
    asked: Sheets,
) -> None:
    """Draw a prompt over guidance scales, from the same noise (unCLIP, Figure 9).

    One sheet: a column for each scale of the decoder, a row for each seed and, with --prior-scales, each scale of the
    prior.
    """
    from unclip.data.lettering import labelled_sheet

    prompt = one_prompt(words, named)
    options = sampling.given(guidance_text=guidance_text, prior_steps=prior_steps, decoder_steps=decoder_steps)
    chosen = scales or [1.0, 2.0, 3.0, 4.0]
    sheet = prepare("guidance-sheet", asked, options)
    with Bars(asked.quiet) as bars:
        found = sheet.system.guidance_sheet(
            prompt,
            chosen,
            prior_scales=prior_scales or None,
            num_images=num_images,
            seed=asked.seed,
            size=sheet.size,
            progress=bars,
            **options,
        )
    rows = [[cell[number] for cell in row] for row in found for number in range(num_images)]
    names = [f"seed {asked.seed + number}" for _ in found for number in range(num_images)]
    if prior_scales:
        several = num_images > 1
        names = [
            f"prior {scale:g}" + (f"\nseed {asked.seed + number}" if several else "")
            for scale in prior_scales
            for number in range(num_images)
        ]
    columns = [f"{'decoder ' if prior_scales else ''}{scale:g}" for scale in chosen]
    shown = {"prompt": prompt, "scales": chosen, "prior_scales": prior_scales or None}
    sheet.save(labelled_sheet(rows, names, columns), f"{prompt} guidance", shown)
