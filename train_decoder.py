"""Train a decoder: deepspeed train_decoder.py --config configs/decoder/emoji_64.yaml [key=value …]"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decoder.config import DecoderRunConfig
from unclip.training.launch import main_for

if TYPE_CHECKING:
    from unclip.training import Distributed


def run(config: DecoderRunConfig, distributed: Distributed) -> None:
    """Train; what computes is imported now that the configuration is known to be right."""
    from decoder.train import run as train
    from unclip.interop.folders import read_decoder

    train(config, distributed, foreign=read_decoder)


if __name__ == "__main__":
    main_for(DecoderRunConfig, run, __doc__)
