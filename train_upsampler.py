"""Train an upsampler: deepspeed train_upsampler.py --config configs/upsampler/emoji_64_to_256.yaml"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.training.launch import main_for
from upsamplers.config import UpsamplerRunConfig

if TYPE_CHECKING:
    from unclip.training import Distributed


def run(config: UpsamplerRunConfig, distributed: Distributed) -> None:
    """Train; what computes is imported now that the configuration is known to be right."""
    from unclip.interop.folders import read_upsampler
    from upsamplers.train import run as train

    train(config, distributed, foreign=read_upsampler)


if __name__ == "__main__":
    main_for(UpsamplerRunConfig, run, __doc__)
