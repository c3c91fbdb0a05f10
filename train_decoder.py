"""Train a decoder: deepspeed train_decoder.py --config configs/decoder/emoji_64.yaml [key=value …]"""

from decoder.config import DecoderRunConfig
from unclip.training import main_for

if __name__ == "__main__":
    from functools import partial

    from decoder.train import run
    from unclip.interop.folders import read_decoder

    main_for(DecoderRunConfig, partial(run, foreign=read_decoder), __doc__)
