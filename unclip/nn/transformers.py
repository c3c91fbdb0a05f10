"""x-transformers' building blocks, imported without a warning that its users can do nothing about."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # It compiles one function by torch.jit.script, which newer releases of PyTorch call deprecated.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from x_transformers import CrossAttender, Decoder, Encoder
    from x_transformers.x_transformers import Attention, FeedForward, LayerNorm

__all__ = ["Attention", "CrossAttender", "Decoder", "Encoder", "FeedForward", "LayerNorm"]
