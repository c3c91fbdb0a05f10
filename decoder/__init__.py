"""The unCLIP decoder: CLIP image embedding (and caption) -> 64 px image."""

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
