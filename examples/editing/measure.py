"""How much of an unCLIP decoder's picture hangs on its caption: what editing by captions has to work with.

    python examples/editing/measure.py [--model emoji]

Prints where the decoder's attention goes, and how far its pictures move when the caption or the image embedding is
replaced, as tables in Markdown.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from unclip import UnCLIP
from unclip.nn import AttentionMaps, watch_attention

PROMPTS = ("red apple", "pizza", "fox", "owl", "sailboat", "sunflower", "camera", "volcano")


def attention_shares(model: UnCLIP, prompts: tuple[str, ...] = PROMPTS) -> dict[str, dict[str, float]]:
    """For each layer the share of its attention that goes to the caption's tokens, to the image embedding's and to the
    feature map's own places, mean over prompts, steps, heads and places; under `alike` what the caption's would be if
    all that may be seen were attended to alike.
    """
    stage, text = model.decoder, model.embed_text(prompts)
    z = model.predict_embedding(prompts)
    words, found = stage.config.text_columns, defaultdict[str, list[Tensor]](list)

    def hear(maps: AttentionMaps) -> None:
        p = maps.probabilities.mean((1, 2))  # over heads and places
        caption, own = p[:, words].sum(1), p[:, maps.context :].sum(1)
        seen = text.mask.sum(1).to(p)
        alike = seen / (seen + p.shape[1] - (words.stop - words.start))
        found[maps.layer].append(torch.stack([caption, 1 - caption - own, own, alike]).mean(1))

    with watch_attention(stage.network, hear):
        stage.sample(z, range(len(prompts)), text=text, guidance=1.0, guidance_text=1.0)
    names = ("caption", "embedding", "places", "alike")
    return {layer: dict(zip(names, torch.stack(rows).mean(0).tolist(), strict=True)) for layer, rows in found.items()}


def movements(model: UnCLIP, prompts: tuple[str, ...] = PROMPTS) -> dict[str, float]:
    """Root mean square distance in levels of 256 between the prompts' pictures and those drawn otherwise."""
    stage, text = model.decoder, model.embed_text(prompts)
    z, seeds = model.predict_embedding(prompts), range(len(prompts))
    turned = [*range(1, len(prompts)), 0]

    def draw(z: Tensor | None, text: object, seeds: range = seeds) -> Tensor:
        return stage.sample(z, seeds, text=text)  # type: ignore[arg-type]

    plain = draw(z, text)
    others = {
        "another seed": draw(z, text, range(100, 100 + len(prompts))),
        "no caption": draw(z, None),
        "another prompt's caption": draw(z, text[turned]),
        "another prompt's image embedding": draw(z[turned], text),
        "no image embedding": draw(None, text),
    }
    distance = {name: (other - plain).square().mean((1, 2, 3)).sqrt().mean() for name, other in others.items()}
    return {name: 127.5 * float(value) for name, value in distance.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    model = UnCLIP.from_pretrained(parser.parse_args().model)
    print("| layer | caption | image embedding | own places | caption, were all alike |\n|---|---|---|---|---|")
    for layer, shares in attention_shares(model).items():
        print(f"| {layer} | {' | '.join(f'{share:.1%}' for share in shares.values())} |")
    print("\n| what is replaced | moves the picture by |\n|---|---|")
    for name, moved in movements(model).items():
        print(f"| {name} | {moved:.1f} |")


if __name__ == "__main__":
    main()
