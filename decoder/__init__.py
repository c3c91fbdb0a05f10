"""The unCLIP decoder: CLIP image embedding (and caption) -> 64 px image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from decoder.config import DecoderConfig, DecoderRunConfig
    from decoder.dalle2 import Dalle2Decoder, Dalle2DecoderConfig
    from decoder.network import Decoder
    from decoder.objective import decoder_loss
    from decoder.sampling import DecoderStage, read_decoder_config
    from decoder.text import CaptionEncoder

__all__ = [
    "CaptionEncoder",
    "Dalle2Decoder",
    "Dalle2DecoderConfig",
    "Decoder",
    "DecoderConfig",
    "DecoderRunConfig",
    "DecoderStage",
    "decoder_loss",
    "read_decoder_config",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "decoder.config": ["DecoderConfig", "DecoderRunConfig"],
        "decoder.dalle2": ["Dalle2Decoder", "Dalle2DecoderConfig"],
        "decoder.network": ["Decoder"],
        "decoder.objective": ["decoder_loss"],
        "decoder.sampling": ["DecoderStage", "read_decoder_config"],
        "decoder.text": ["CaptionEncoder"],
    },
)
