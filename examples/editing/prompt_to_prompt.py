"""Prompt-to-Prompt (Hertz et al. 2022) on an unCLIP decoder: one picture, its caption changed, its attention kept.

    python examples/editing/prompt_to_prompt.py --source "red apple" --target "green apple" --out apple.png

The sheet shows the source, and the target with its own attention and with the source's.
"""

from __future__ import annotations

import argparse
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unclip import UnCLIP
from unclip.data import make_grid, to_pil
from unclip.nn import AttentionMaps, watch_attention


def prompt_to_prompt(
    model: UnCLIP,
    source: str,
    target: str,
    *,
    embeddings: Literal["own", "shared"] = "own",
    text: float = 0.8,
    everything: float = 0.4,
    seed: int = 0,
    steps: int | str | None = None,
    guidance: float | None = None,
) -> Tensor:
    """-> (2, 3, S, S) in [-1, 1] at the decoder's size: the source, and the target with the source's attention.

    Both are drawn from one noise. For the first `text` of the steps the target's attention to the words that both
    captions have, and to those that replace each other, is the source's (§3.3, "word swap" and "adding a new phrase");
    for the first `everything` of them all of its attention is. The paper's decoder attends to text and picture in
    separate layers; here one softmax is over both, so that what is left of a row is scaled to sum to 1.
    `embeddings`: the target has its own image embedding from the prior, or shares the source's and differs in the
    caption alone.
    """
    stage, captions = model.decoder, [source, target]
    features = model.embed_text(captions)
    z = model.predict_embedding(captions, seed=seed)
    if embeddings == "shared":
        z = z[:1].expand(2, -1)
    pairs = aligned(model, source, target)
    first = stage.config.text_columns.start
    columns = [(first + i, first + j) for i, j in pairs]
    done = [0.0]

    def hear(maps: AttentionMaps) -> Tensor | None:
        if done[0] >= max(text, everything):
            return None
        both = maps.probabilities.unflatten(0, (-1, 2))  # under guidance: (branches, source and target, …)
        own, theirs = both[:, 1], both[:, 0]
        if done[0] < everything:
            changed = theirs
        elif columns and maps.context:
            here, there = [j for _, j in columns], [i for i, _ in columns]
            changed = own.clone()
            changed[..., here] = theirs[..., there]
            rest = torch.ones(own.shape[-1], dtype=torch.bool, device=own.device)
            rest[here] = False
            left = 1 - changed[..., here].sum(-1, keepdim=True)
            changed[..., rest] *= left / own[..., rest].sum(-1, keepdim=True).clamp_min(1e-12)
        else:
            return None
        return torch.stack([theirs, changed], dim=1).flatten(0, 1)

    def count(number: int, total: int, _x: Tensor) -> None:
        done[0] = number / total

    with watch_attention(stage.network, hear):
        return stage.sample(z, [seed, seed], text=features, steps=steps, guidance=guidance, callback=count)


def aligned(model: UnCLIP, source: str, target: str) -> list[tuple[int, int]]:
    """Places of tokens (source, target) that both captions have, or that stand for each other in as many places."""
    ids, mask = model.clip.token_ids([source, target])
    before, after = (row[real].tolist() for row, real in zip(ids, mask, strict=True))
    pairs: list[tuple[int, int]] = []
    for kind, i, i_end, j, j_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and i_end - i == j_end - j):
            pairs += list(zip(range(i, i_end), range(j, j_end), strict=True))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--embeddings", choices=("own", "shared"), default="own")
    parser.add_argument("--text", type=float, default=0.8)
    parser.add_argument("--everything", type=float, default=0.4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("prompt_to_prompt.png"))
    given = parser.parse_args()
    model = UnCLIP.from_pretrained(given.model)
    shared = {"embeddings": given.embeddings, "seed": given.seed, "steps": given.steps}
    plain = prompt_to_prompt(model, given.source, given.target, text=0, everything=0, **shared)
    edited = prompt_to_prompt(
        model, given.source, given.target, text=given.text, everything=given.everything, **shared
    )
    make_grid([to_pil(image) for image in (*plain, edited[1])], columns=3).save(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
