"""The same digits by dalle2-pytorch's DiffusionPrior and Decoder, with its own trainers, from the same embeddings.

Equal are: pictures, CLIP features (computed before its clock starts), batch, learning rate and its course, weight
decay, about the number of parameters, and the seconds each stage may take, which are those that ours took from
call to exported model. Its objectives are its defaults: the prior predicts x_0, the decoder the noise with learned
variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.contest import parameters_of
from benchmarks.digits_data import SIZE, Digits, captions_of
from benchmarks.digits_ours import Stopwatch
from benchmarks.peer_dalle2 import INSTALLED, _nearest
from unclip.clip import FrozenCLIP, TextFeatures

__all__ = ["INSTALLED", "Budget", "Peer", "features"]

Clock = Literal["wall", "cpu"]
STEPS = 20  # of its DDIM, in both stages; ours take 16 and 20


@dataclass(frozen=True)
class Budget:
    """Seconds of a stage by one of the clocks, and ours' learning rate, warm-up and batch."""

    seconds: float
    clock: Clock
    lr: float
    warmup: int
    batch: int


@dataclass(frozen=True)
class Features:
    """CLIP features of the training digits: image embeddings (N, E), and of all phrasings (10, P) the text features."""

    image: Tensor
    text: TextFeatures
    phrasings: int
    labels: Tensor


def features(clip: FrozenCLIP, digits: Digits) -> Features:
    captions = [caption for label in range(10) for caption in captions_of(label)]
    image = torch.cat([clip.encode_image(part) for part in digits.pictures.split(256)])
    return Features(image, clip.encode_text(captions), len(captions) // 10, digits.labels)


class Peer:
    """Prior and decoder of dalle2-pytorch, trained one after the other."""

    def __init__(
        self, clip: FrozenCLIP, prior_parameters: int, decoder_parameters: int, widths: tuple[int, ...]
    ) -> None:
        import dalle2_pytorch.dalle2_pytorch as package

        self.clip, dim, length = clip, clip.embedding_dim, clip.context_length

        def prior_of(shape: tuple[int, float]) -> Any:
            depth, mult = shape
            return package.DiffusionPriorNetwork(
                dim=dim, depth=depth, heads=4, dim_head=32, ff_mult=mult, max_text_len=length
            )

        def unet_of(sizes: tuple[int, int]) -> Any:
            width, context = sizes
            return package.Unet(
                dim=width, dim_mults=tuple(w // widths[0] for w in widths), cond_dim=context, num_resnet_blocks=2,
                image_embed_dim=dim, text_embed_dim=dim, max_text_len=length, cond_on_text_encodings=True,
                self_attn=(False,) * (len(widths) - 1) + (True,), attn_heads=2,
            )  # fmt: skip

        # Its width is the embedding's, so that depth takes up the difference.
        shapes = [(depth, step / 16) for depth in range(1, 17) for step in range(32, 97)]
        shape = _nearest(prior_of, shapes, prior_parameters)
        # In steps that its GroupNorms of 8 groups allow; where context and embedding are equally wide, it makes no
        # tokens of the embedding and fails.
        pairs = [(w, c) for w in range(16, 4 * widths[0], 8) for c in range(16, 4 * widths[0], 8) if c != dim]
        sizes = _nearest(unet_of, pairs, decoder_parameters)
        self.prior = package.DiffusionPrior(
            net=prior_of(shape), image_embed_dim=dim, cond_drop_prob=0.1, timesteps=1000, sample_timesteps=STEPS
        )
        self.decoder = package.Decoder(
            unet=unet_of(sizes), image_size=SIZE, timesteps=1000, sample_timesteps=STEPS, image_cond_drop_prob=0.1,
            text_cond_drop_prob=0.5,
        )  # fmt: skip
        self.told: dict[str, Any] = {
            "prior": {"parameters": parameters_of(self.prior.net), "depth, ff_mult": shape},
            "decoder": {"parameters": parameters_of(self.decoder.unets), "dim, cond_dim": sizes},
        }

    def train_prior(self, data: Features, budget: Budget) -> None:
        from dalle2_pytorch.trainer import DiffusionPriorTrainer

        trainer = DiffusionPriorTrainer(
            self.prior, lr=budget.lr, wd=0.02, max_grad_norm=1.0, ema_beta=0.98, ema_update_every=1
        )

        def step(rows: Tensor, generator: torch.Generator) -> float:
            text = _captions(data, rows, generator)
            # It scales the embeddings it is given in place; those indexed are copies.
            loss = trainer(text_embed=text.embedding, image_embed=data.image[rows], text_encodings=_masked(text))
            trainer.update()
            return float(loss)

        self.told["prior"] |= _until(budget, len(data.labels), trainer.optimizer, step)
        self.prior = trainer.ema_diffusion_prior.ema_model.eval()

    def train_decoder(self, data: Features, pictures: Tensor, budget: Budget) -> None:
        from dalle2_pytorch.trainer import DecoderTrainer

        trainer = DecoderTrainer(
            self.decoder, lr=budget.lr, wd=0.02, max_grad_norm=1.0, ema_beta=0.98, ema_update_every=1,
            ema_update_after_step=100,
        )  # fmt: skip
        between_0_and_1 = (pictures + 1) / 2

        def step(rows: Tensor, generator: torch.Generator) -> float:
            text = _captions(data, rows, generator)
            loss = trainer(
                between_0_and_1[rows], image_embed=data.image[rows].clone(), text_encodings=_masked(text), unet_number=1
            )
            trainer.update(1)
            return float(loss)

        self.told["decoder"] |= _until(budget, len(data.labels), trainer.optim0, step)
        self.trainer = trainer

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], guidance: float, seed: int, batch: int = 120) -> Tensor:
        """A picture a prompt, (B, 3, SIZE, SIZE) in [-1, 1]; the prior draws two and keeps the better, its default."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = []
            for start in range(0, len(prompts), batch):
                text = self.clip.encode_text(prompts[start : start + batch])
                given = {"text_embed": text.embedding, "text_encodings": _masked(text)}
                shape = tuple(text.embedding.shape)
                pair = [self.prior.p_sample_loop(shape, text_cond=given, timesteps=STEPS) for _ in range(2)]
                stacked = torch.stack(pair)
                best = (stacked * text.embedding).sum(2).argmax(0)
                embedding = stacked[best, torch.arange(len(best))]
                drawn.append(
                    self.trainer.sample(image_embed=embedding, text_encodings=_masked(text), cond_scale=guidance)
                )
        return torch.cat(drawn).clamp(0, 1) * 2 - 1


def _captions(data: Features, rows: Tensor, generator: torch.Generator) -> TextFeatures:
    """A phrasing of each row's digit, drawn at random."""
    which = torch.randint(data.phrasings, (len(rows),), generator=generator)
    return data.text[data.labels[rows] * data.phrasings + which]


def _masked(text: TextFeatures) -> Tensor:
    """It takes tokens of zeros for padding."""
    return text.tokens * text.mask[..., None]


def _until(
    budget: Budget, rows: int, optimizer: Any, step: Callable[[Tensor, torch.Generator], float]
) -> dict[str, Any]:
    """Steps until the budget is spent; the learning rate falls by a cosine of the share spent, after a warm-up."""
    generator, watch = torch.Generator().manual_seed(0), Stopwatch()
    losses: list[float] = []
    while (share := getattr(watch.read(), budget.clock) / budget.seconds) < 1:
        rate = budget.lr * min((len(losses) + 1) / budget.warmup, 1) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(step(torch.randint(rows, (budget.batch,), generator=generator), generator))
    spent = watch.read()
    last = losses[-20:]
    return {"steps": len(losses), "loss": sum(last) / len(last), "wall": spent.wall, "cpu": spent.cpu}
