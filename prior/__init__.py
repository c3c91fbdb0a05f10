"""The priors: caption -> CLIP image embedding, by diffusion or autoregressively."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from prior.autoregressive import AutoregressivePrior
    from prior.config import AutoregressivePriorConfig, PriorConfig, PriorRunConfig
    from prior.dalle2 import Dalle2Prior, Dalle2PriorConfig
    from prior.network import Prior
    from prior.objective import autoregressive_loss, prior_loss
    from prior.sampling import (
        AutoregressivePriorStage,
        DiffusionPriorStage,
        PriorStage,
        build_network,
        build_stage,
        read_prior_config,
    )

__all__ = [
    "AutoregressivePrior",
    "AutoregressivePriorConfig",
    "AutoregressivePriorStage",
    "Dalle2Prior",
    "Dalle2PriorConfig",
    "DiffusionPriorStage",
    "Prior",
    "PriorConfig",
    "PriorRunConfig",
    "PriorStage",
    "autoregressive_loss",
    "build_network",
    "build_stage",
    "prior_loss",
    "read_prior_config",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "prior.autoregressive": ["AutoregressivePrior"],
        "prior.config": ["AutoregressivePriorConfig", "PriorConfig", "PriorRunConfig"],
        "prior.dalle2": ["Dalle2Prior", "Dalle2PriorConfig"],
        "prior.network": ["Prior"],
        "prior.objective": ["autoregressive_loss", "prior_loss"],
        "prior.sampling": [
            "AutoregressivePriorStage",
            "DiffusionPriorStage",
            "PriorStage",
            "build_network",
            "build_stage",
            "read_prior_config",
        ],
    },
)
