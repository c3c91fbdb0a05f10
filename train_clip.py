"""Train a small CLIP with open_clip's loss: deepspeed train_clip.py --config configs/clip/emoji.yaml"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.training.clip_config import ClipRunConfig
from unclip.training.launch import main_for

if TYPE_CHECKING:
    from unclip.training import Distributed


def run(config: ClipRunConfig, distributed: Distributed) -> None:
    """Train; what computes is imported now that the configuration is known to be right."""
    from unclip.training.clip import run as train

    train(config, distributed)


if __name__ == "__main__":
    main_for(ClipRunConfig, run, __doc__)
