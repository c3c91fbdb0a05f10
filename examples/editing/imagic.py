"""Imagic (Kawar et al. 2022) on an unCLIP decoder: a picture of one's own, changed towards a prompt.

    python examples/editing/imagic.py fox.png "wolf" --out fox_to_wolf.png

The paper looks for a text embedding of the picture; an unCLIP decoder draws from an image embedding, so that is what is
looked for here. The sheet shows the way from it to the prompt's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoder import DecoderStage
from decoder.objective import decoder_loss
from unclip import UnCLIP
from unclip.data import make_grid, to_pil
from unclip.errors import UsageError
from unclip.geometry import slerp
from unclip.parts import image_pixels

BATCH = 4
"""Levels of noise at once."""


@dataclass(frozen=True)
class Imagic:
    """A decoder that has learned a picture: `stage`, the embedding (1, E) that it draws it from, and the prompt's."""

    stage: DecoderStage
    embedding: Tensor
    target: Tensor

    def draw(self, eta: float, seed: int = 0, **options: Any) -> Tensor:
        """(1, 3, S, S): the picture at eta 0, the prompt at 1, and on the great circle between (§3.2, step C)."""
        weight = torch.tensor([eta], dtype=torch.float64, device=self.embedding.device)
        return self.stage.sample(slerp(self.embedding, self.target, weight), [seed], **options)


def imagic(
    model: UnCLIP,
    image: Any,
    prompt: str,
    *,
    embedding_steps: int = 30,
    network_steps: int = 60,
    embedding_lr: float = 1e-2,
    network_lr: float = 2e-4,
    seed: int = 0,
) -> Imagic:
    """Learn a picture (§3.2): an embedding near the prompt's from which the decoder draws it (step A), then, with that
    embedding fixed, the decoder's weights (step B). The model itself stays as it is. UsageError: fewer steps than 0.
    """
    if min(embedding_steps, network_steps) < 0:
        raise UsageError(f"embedding_steps is {embedding_steps} and network_steps {network_steps}; expected 0 or more")
    config = model.decoder.config.model_copy(
        update={"drop_text": 1.0, "drop_embedding": 0.0, "drop_both": 0.0, "embedding_noise": 0.0}
    )
    network = copy.deepcopy(model.decoder.network).eval()
    pixels = model.decoder.to_x_start(image_pixels(image, config.image_size, model.device)).expand(BATCH, -1, -1, -1)
    text = model.embed_text([prompt] * BATCH)
    target = model.predict_embedding(prompt, seed=seed).clone()
    generator = torch.Generator(model.device).manual_seed(seed)
    own = nn.Parameter(target.clone())
    length = target.norm(dim=1, keepdim=True)

    def embedding() -> Tensor:
        """Of the length that it began with."""
        return F.normalize(own, dim=1) * length

    def loss() -> Tensor:
        z = embedding().expand(BATCH, -1)
        return decoder_loss(network, model.decoder.process, config, pixels, z, text, generator)["loss"].mean()

    _minimise(loss, [own], embedding_steps, embedding_lr)
    own.requires_grad_(False)
    network.requires_grad_(True)
    _minimise(loss, list(network.parameters()), network_steps, network_lr)
    return Imagic(DecoderStage(network.requires_grad_(False), config, model.device), embedding().detach(), target)


def _minimise(loss: Callable[[], Tensor], parameters: list[nn.Parameter], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--embedding-steps", type=int, default=30)
    parser.add_argument("--network-steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("imagic.png"))
    given = parser.parse_args()
    model = UnCLIP.from_pretrained(given.model)
    steps = {"embedding_steps": given.embedding_steps, "network_steps": given.network_steps}
    found = imagic(model, given.image, given.prompt, seed=given.seed, **steps)
    drawn = torch.cat([found.draw(eta, given.seed) for eta in given.etas])
    make_grid([to_pil(image) for image in drawn], columns=len(drawn)).save(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
