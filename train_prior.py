"""Train a prior, diffusion or autoregressive:
deepspeed train_prior.py --config configs/prior/emoji.yaml [key=value …]
"""

from prior.config import PriorRunConfig
from unclip.training import main_for

if __name__ == "__main__":
    from prior.train import run

    main_for(PriorRunConfig, run, __doc__)
