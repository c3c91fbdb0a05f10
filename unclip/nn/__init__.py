"""Network building blocks. Nothing here knows a noise schedule."""

from unclip.nn.attention import AttentionMaps, watch_attention
from unclip.nn.embeddings import timestep_embedding
from unclip.nn.unet import UNet, UNetConfig

__all__ = ["AttentionMaps", "UNet", "UNetConfig", "timestep_embedding", "watch_attention"]
