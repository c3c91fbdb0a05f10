"""Train a small CLIP with open_clip's loss: deepspeed train_clip.py --config configs/clip/emoji.yaml"""

from unclip.training.clip import ClipRunConfig, run
from unclip.training.launch import main_for

if __name__ == "__main__":
    main_for(ClipRunConfig, run, __doc__)
