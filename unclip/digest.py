"""Short names for networks by their weights, which outlive a change of precision."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from unclip.config import Config

_SAMPLING = ("steps", "sampler", "guidance", "guidance_text", "guidance_interval", "guidance_rescale")
_APART: Any = {**dict.fromkeys(_SAMPLING, True), "latent": {"name": True}}  # the autoencoder's place is no part of it
_PROBE = 16
_HELD = "digest_before"


def hold_in(module: nn.Module, dtype: torch.dtype, config: Config | None = None) -> None:
    """Keep a network's weights in this precision, and its `digest` as it was."""
    setattr(module, _HELD, digest(module, config))
    module.to(dtype)


def digest(module: nn.Module, config: Config | None = None) -> str:
    """A short name for a network with these weights: 16 hexadecimal digits.

    Made of the configuration, without what only sets how it is sampled by default, and of each tensor's name, shape and
    first values, which differ between any two trainings; whole weights would take seconds to read. Of a network that
    `hold_in` has brought to another precision since, it is the name that it had before.
    """
    if (before := getattr(module, _HELD, None)) is not None:
        return str(before)
    known = hashlib.sha256()
    if config is not None:
        body: Any = config.model_dump(mode="json", exclude_defaults=True, exclude=_APART)
        known.update(json.dumps(body, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        known.update(f"{name} {tuple(tensor.shape)}".encode())
        first = tensor.detach()
        while first.ndim > 1 and len(first) and first[0].numel() >= _PROBE:
            first = first[0]  # flattening would copy all of one that is not contiguous
        known.update(first.reshape(-1)[:_PROBE].float().cpu().numpy().tobytes())
    return known.hexdigest()[:16]
