"""Train a prior, diffusion or autoregressive:
deepspeed train_prior.py --config configs/prior/emoji.yaml [key=value …]
"""

from prior.config import PriorRunConfig
from unclip.training import main_for

if __name__ == "__main__":
    from functools import partial

    from prior.train import run
    from unclip.interop.folders import read_prior

    main_for(PriorRunConfig, partial(run, foreign=read_prior), __doc__)
