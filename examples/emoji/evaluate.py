"""Measure a bundle trained on the emoji set: does the picture drawn for a name look most like that emoji?

    python examples/emoji/evaluate.py --data data/emoji_256 [--model emoji] [--names 100]

For each name a 64 px picture is drawn; both it and every emoji of the data set are reduced to 32×32 on white, and the
nearest by mean squared error must be the named one. Variations are judged in the same way, from the emoji's own
picture.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip import UnCLIP
from unclip.data import load_image, make_grid, to_pil, to_tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare.py from all emoji")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--names", type=int, default=100, help="how many names, drawn with a fixed seed; 0 for all")
    parser.add_argument("--prompt", default="{name}", help="how the name is phrased")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--sheet", type=Path, help="write a sheet of the pictures drawn")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    arguments = parser.parse_args()

    model = UnCLIP.from_pretrained(arguments.model, size=64)
    rows = [json.loads(line) for line in (arguments.data / "metadata.jsonl").read_text().splitlines()]
    pictures = torch.stack([to_tensor(load_image(arguments.data / row["file_name"]), 64) for row in rows])
    where = {row["name"]: index for index, row in enumerate(rows)}
    names = [name for name in model.manifest["example_prompts"] if name in where]
    if arguments.names:
        names = random.Random(0).sample(names, min(arguments.names, len(names)))
    targets = torch.tensor([where[name] for name in names])
    options = {
        "size": 64,
        "guidance": arguments.guidance,
        "prior_guidance": arguments.prior_guidance,
        "decoder_steps": arguments.decoder_steps,
        "sampler": arguments.sampler,
    }
    prompts = [arguments.prompt.format(name=name) for name in names]
    drawn = batched(len(names), lambda s: model.sample(prompts[s], seed=arguments.seed, output="tensor", **options))
    embeddings = batched(len(names), lambda s: model.embed_image(pictures[targets[s]]))
    varied = batched(
        len(names), lambda s: model.decode(embeddings[s], seed=arguments.seed + 1, output="tensor", **options)
    )
    predicted = batched(len(names), lambda s: model.predict_embedding(prompts[s], seed=arguments.seed))
    right, varied_right = nearest(drawn, pictures) == targets, nearest(varied, pictures) == targets
    report = {
        "names": len(names),
        "identity": right.float().mean().item(),
        "variations_identity": varied_right.float().mean().item(),
        "cos_prediction_real": F.cosine_similarity(predicted, embeddings).mean().item(),
        "cos_prediction_unrelated": F.cosine_similarity(predicted, embeddings.roll(1, 0)).mean().item(),
        "wrong": [name for name, ok in zip(names, right.tolist(), strict=True) if not ok],
    }
    print(json.dumps(report) if arguments.json else json.dumps(report, indent=2, ensure_ascii=False))
    if arguments.sheet:
        make_grid([to_pil(image) for image in drawn], 16).save(arguments.sheet)


def nearest(images: Tensor, pictures: Tensor) -> Tensor:
    """Index of the nearest of `pictures` for each of `images`, by mean squared error at 32×32."""
    a, b = (F.interpolate(x, (32, 32), mode="area").flatten(1) for x in (images, pictures))
    return torch.cdist(a, b).argmin(dim=1)


def batched(count: int, work: object, size: int = 20) -> Tensor:
    return torch.cat([work(slice(i, i + size)) for i in range(0, count, size)])  # type: ignore[operator]


if __name__ == "__main__":
    main()
