"""A checkpoint of DALLE2-pytorch -> folders of parts, which `unclip bundle` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip.bundle import check_part_free, save_part
from unclip.errors import UnclipError
from unclip.hub import Tell, aloud
from unclip.interop.dalle2 import read_checkpoint
from unclip.interop.dalle2_decoder import decoder_from_dalle2
from unclip.interop.dalle2_prior import prior_from_dalle2
from unclip.interop.dalle2_upsamplers import enlarging_unets, named_unet, upsampler_from_dalle2


def convert_dalle2(
    source: Path,
    out: Path,
    config: Path | Mapping[str, Any] | None = None,
    version: str | None = None,
    text_length: int = 77,
    overwrite: bool = False,
    tell: Tell = aloud,
    **changes: Any,
) -> str:
    """Write the prior or decoder that a checkpoint holds to the folder `out`, and return which of the two it is. A
    decoder's enlarging U-Nets are written beside it, as `upsampler_<edge of their pictures>`. `tell` hears of each
    that is written, and of each that is left out and why; by default on stderr.

    `config`, `version`: see `read_checkpoint`; `text_length` is that of the CLIP that it was trained with; `changes`
    set fields of the prior's or decoder's configuration (steps, guidance, …). Raises UnclipError: as the readers; `out`
    or a folder beside it is something else, or exists and `overwrite` is not set.
    """
    checkpoint = read_checkpoint(source, config, version)
    check_part_free(out, checkpoint.kind, overwrite)
    if checkpoint.kind == "prior":
        prior, state = prior_from_dalle2(checkpoint, text_length, **changes)
        save_part(out, "prior", prior, state)
        return checkpoint.kind
    decoder, state = decoder_from_dalle2(checkpoint, text_length, **changes)
    upsamplers, left_out = {}, []
    for number in enlarging_unets(checkpoint):
        name = named_unet(checkpoint, number)
        try:
            upsamplers[name] = upsampler_from_dalle2(checkpoint, number)
        except UnclipError as error:
            left_out.append(f"left out: {name}: {error}")
    places = {name: out.absolute().parent / f"upsampler_{one.high_size}" for name, (one, _) in upsamplers.items()}
    for place in places.values():
        if place == out.absolute():
            raise UnclipError(f"{out} is where an enlarging U-Net is written, beside the decoder; name another folder")
        check_part_free(place, "upsampler", overwrite)
    save_part(out, "decoder", decoder, state)
    for name, place in places.items():
        save_part(place, "upsampler", *upsamplers[name])
        tell(f"{name} is written to {place}")
    for sentence in left_out:
        tell(sentence)
    return checkpoint.kind
