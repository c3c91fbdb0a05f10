"""The unCLIP decoder: CLIP image embedding (and caption) -> 64 px image."""

from decoder.config import DecoderConfig, DecoderRunConfig
from decoder.network import Decoder
from decoder.objective import decoder_loss
from decoder.sampling import DecoderStage
from decoder.text import CaptionEncoder

__all__ = ["CaptionEncoder", "Decoder", "DecoderConfig", "DecoderRunConfig", "DecoderStage", "decoder_loss"]
