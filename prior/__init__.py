"""The diffusion prior: caption -> CLIP image embedding."""

from prior.config import PriorConfig, PriorRunConfig
from prior.network import Prior
from prior.objective import prior_loss
from prior.sampling import PriorStage

__all__ = ["Prior", "PriorConfig", "PriorRunConfig", "PriorStage", "prior_loss"]
