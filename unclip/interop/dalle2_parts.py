"""A checkpoint of DALLE2-pytorch -> a part's folder, which `unclip bundle` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip.bundle import check_part_free, save_part
from unclip.hub import Tell, aloud
from unclip.interop.dalle2 import read_checkpoint
from unclip.interop.dalle2_decoder import decoder_from_dalle2, left_out
from unclip.interop.dalle2_prior import prior_from_dalle2


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
    """Write the prior or decoder that a checkpoint holds to the folder `out`, and return which of the two it is. `tell`
    hears of each network that is left out, by default on stderr.

    `config`, `version`: see `read_checkpoint`; `text_length` is that of the CLIP that it was trained with; `changes`
    set fields of our configuration (steps, guidance, …). Raises UnclipError: as the readers; `out` is something else,
    or exists and `overwrite` is not set.
    """
    checkpoint = read_checkpoint(source, config, version)
    check_part_free(out, checkpoint.kind, overwrite)
    if checkpoint.kind == "prior":
        prior, state = prior_from_dalle2(checkpoint, text_length, **changes)
        save_part(out, "prior", prior, state)
    else:
        decoder, state = decoder_from_dalle2(checkpoint, text_length, **changes)
        save_part(out, "decoder", decoder, state)
        for what in left_out(checkpoint):
            tell(f"left out: {what}")
    return checkpoint.kind
