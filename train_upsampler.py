"""Train an upsampler: deepspeed train_upsampler.py --config configs/upsampler/emoji_64_to_256.yaml"""

from unclip.training import main_for
from upsamplers.config import UpsamplerRunConfig

if __name__ == "__main__":
    from functools import partial

    from unclip.interop.folders import read_upsampler
    from upsamplers.train import run

    description = "Train an upsampler (64 to 256 or 256 to 1024 pixels)."
    main_for(UpsamplerRunConfig, partial(run, foreign=read_upsampler), description)
