"""The priors: caption -> CLIP image embedding, by diffusion or autoregressively."""

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
