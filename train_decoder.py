"""Train a decoder: deepspeed train_decoder.py --config configs/decoder/emoji_64.yaml [key=value …]"""

from decoder.config import DecoderRunConfig
from unclip.training import main_for

if __name__ == "__main__":
    from decoder.train import run

    main_for(DecoderRunConfig, run, __doc__)
