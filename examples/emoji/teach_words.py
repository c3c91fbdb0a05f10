"""Teach a decoder where things stand from words, by what it draws from embeddings already.

    python examples/emoji/teach_words.py --decoder runs/decoder/model --clip runs/clip/model --data data/emoji_scenes \
        --out runs/taught

A decoder that draws scenes from image embeddings makes a map of each for its lowest feature map (`spatial_seed`). Here
`text_seed` learns the same map from the scene's caption: squared error, with neither U-Net nor noise, so that a minute
of it is worth many of the decoder's own training, which then goes on from `--out`. Nothing else is changed, and a
decoder without `text_seed` gets one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from prepare import positive
from torch import Tensor
from torch.nn import functional as F

from decoder.config import DecoderConfig
from decoder.network import Decoder
from decoder.sampling import KIND
from decoder.start import begin_from, read_part
from decoder.text import TextSeed
from unclip.bundle import save_part
from unclip.clip import FrozenCLIP
from unclip.clip_identity import identify
from unclip.config import DataConfig
from unclip.data.batches import build_batches
from unclip.errors import UnclipError
from unclip.training.start import open_start

ENCODED = 250  # pictures and captions at a time
BATCH = 128


def with_text_seed(folder: str) -> tuple[Decoder, DecoderConfig, TextSeed]:
    """The decoder of a run or a bundle, with a map of the caption. UnclipError: it makes none of the embedding."""
    start = open_start(folder, KIND, read_part)
    if not start.config.spatial_seed:
        raise UnclipError(f"the decoder of {folder} makes no map of embeddings (model.spatial_seed) to learn from")
    config = start.config.model_copy(update={"text_seed": True})
    network = Decoder(config)
    begin_from(network, start)
    assert network.text_seed is not None
    return network.eval().requires_grad_(False), config, network.text_seed.requires_grad_(True)


@torch.no_grad()
def read_scenes(clip: FrozenCLIP, data: str, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` scenes: image embeddings (N, E), the captions' tokens (N, L, D) and their masks (N, L)."""
    source = DataConfig(source=data, image_size=size, streaming=True, cache=False)
    found = []
    for batch in islice(build_batches(source, batch_size=ENCODED), -(-count // ENCODED)):
        text = clip.encode_text(batch["caption"])
        found.append((clip.encode_image(batch["image"]), text.tokens, text.mask))
        print(f"{len(found) * ENCODED} scenes read", file=sys.stderr)
    embeddings, tokens, masks = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    return embeddings, tokens, masks


def teach(
    network: Decoder, seed: TextSeed, scenes: tuple[Tensor, Tensor, Tensor], steps: int, lr: float
) -> float:
    """Train `seed` alone. Returns which part of the maps' variance is left, of the last hundredth of the scenes."""
    embeddings, tokens, masks = scenes
    held = max(len(embeddings) // 100, 1)
    optimizer = torch.optim.AdamW(seed.parameters(), lr / 2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    with torch.no_grad():
        nothing = network.embedding_map(network.null_embedding[None])

    def error(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error, and the variance of what is to be learned."""
        with torch.no_grad():
            target = network.embedding_map(embeddings[chosen] * network.config.scale) - nothing
            context, seen = network.caption_context(tokens[chosen], masks[chosen])
        return F.mse_loss(seed(context, seen), target), target.var(0).mean()

    for step in range(1, steps + 1):
        loss, variance = error(torch.randint(len(embeddings) - held, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}  {loss / variance:.3f} of the variance left", file=sys.stderr)
    with torch.no_grad():
        loss, variance = error(torch.arange(len(embeddings) - held, len(embeddings)))
    return float(loss / variance)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", required=True, help="folder of a run, a part or a bundle")
    parser.add_argument("--clip", required=True, help="the CLIP that it was trained with")
    parser.add_argument("--data", required=True, help="scenes with their captions, as scenes.py makes them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the taught decoder, for init_from")
    parser.add_argument("--scenes", type=positive, default=30_000, help="how many to learn from")
    parser.add_argument("--steps", type=positive, default=2500)
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest of one cycle")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(args.seed)
    try:
        if args.out.exists():
            raise UnclipError(f"{args.out} exists already; name a new folder")
        network, config, seed = with_text_seed(args.decoder)
        clip = FrozenCLIP.load(args.clip)
        left = teach(network, seed, read_scenes(clip, args.data, args.scenes, config.image_size), args.steps, args.lr)
        save_part(args.out, KIND, config, network.state_dict(), {"clip": identify(args.clip)})
    except (UnclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {left:.1%} of the variance is left in scenes that were not learned from", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
