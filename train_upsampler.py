"""Train an upsampler: deepspeed train_upsampler.py --config configs/upsampler/emoji_64_to_256.yaml"""

from unclip.training import main_for
from upsamplers.config import UpsamplerRunConfig

if __name__ == "__main__":
    from upsamplers.train import run

    main_for(UpsamplerRunConfig, run, "Train an upsampler (64 to 256 or 256 to 1024 pixels).")
