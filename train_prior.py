"""Train a prior, diffusion or autoregressive:
deepspeed train_prior.py --config configs/prior/emoji.yaml [key=value …]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prior.config import PriorRunConfig
from unclip.training.launch import main_for

if TYPE_CHECKING:
    from unclip.training import Distributed


def run(config: PriorRunConfig, distributed: Distributed) -> None:
    """Train; what computes is imported now that the configuration is known to be right."""
    from prior.train import run as train
    from unclip.interop.folders import read_prior

    train(config, distributed, foreign=read_prior)


if __name__ == "__main__":
    main_for(PriorRunConfig, run, __doc__)
