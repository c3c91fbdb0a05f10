"""Network building blocks. Nothing here knows a noise schedule."""

from unclip.nn.embeddings import timestep_embedding
from unclip.nn.unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig", "timestep_embedding"]
