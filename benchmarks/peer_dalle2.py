"""dalle2-pytorch's networks at our number of parameters, image size, batch and steps. Its results are its own.

Its architectures differ from ours, so that "equal" means what is stated here and no more: the same inputs and
outputs, parameters within 2 %, and in sampling as many passes through the network.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Contestant, parameters_of, training_step
from benchmarks.shapes import PriorShape, UNetShape, captions, rand, timesteps
from benchmarks.timing import Work
from unclip.clip import TextFeatures

PARAMETERS_WITHIN = 0.02
INSTALLED = True
try:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import dalle2_pytorch.dalle2_pytorch as peer
except ImportError:
    INSTALLED = False
else:
    peer.tqdm = lambda iterable, **_: iterable  # its progress bars are no part of the work


def _diffusion_prior(shape: PriorShape, parameters: int, device: torch.device) -> tuple[Any, float]:
    def build(mult: float) -> nn.Module:
        return peer.DiffusionPriorNetwork(  # type: ignore[no-any-return]
            dim=shape.embedding,
            depth=shape.depth,
            heads=shape.heads,
            dim_head=shape.head_dim,
            ff_mult=mult,
            max_text_len=shape.tokens,
        )

    mult = _nearest(build, [step / 16 for step in range(8, 160)], parameters)
    torch.manual_seed(0)
    # cond_drop_prob is what allows guidance; the network itself is called without dropout below.
    options = {"image_embed_dim": shape.embedding, "cond_drop_prob": 0.1, "timesteps": 1000}
    return peer.DiffusionPrior(net=build(mult), **options).to(device), mult


def prior_trainer(
    shape: PriorShape, parameters: int, text: TextFeatures, embedding: Tensor, steps: int, device: torch.device
) -> Work:
    """Its DiffusionPriorTrainer: AdamW, clipping, a cosine schedule and the moving average; a turn is `steps` steps."""
    from dalle2_pytorch.trainer import DiffusionPriorTrainer

    whole, _ = _diffusion_prior(shape, parameters, device)
    trainer = DiffusionPriorTrainer(
        whole, lr=1e-4, wd=0.01, max_grad_norm=1.0, use_ema=True, cosine_decay_max_steps=1_000_000
    ).to(device)
    encodings = text.tokens * text.mask[..., None]

    def turn() -> None:
        for _ in range(steps):
            # It scales the embedding it is given in place.
            trainer(text_embed=text.embedding, image_embed=embedding.clone(), text_encodings=encodings)
            trainer.update()

    return turn


def prior(shape: PriorShape, parameters: int, device: torch.device) -> Contestant:
    """Its width is the embedding's; the feed-forward layers take up the difference in parameters."""
    whole, mult = _diffusion_prior(shape, parameters, device)
    whole.eval().requires_grad_(False)
    network, text = whole.net, captions(shape.batch, shape.tokens, shape.embedding).to(device)
    given = {"text_embed": text.embedding, "text_encodings": text.tokens * text.mask[..., None]}
    x = rand(shape.batch, shape.embedding, seed=7).to(device)
    target, t = rand(shape.batch, shape.embedding, seed=8).to(device), timesteps(shape.batch).to(device)

    def run(net: nn.Module) -> Tensor:
        return net(x, t, **given)  # type: ignore[no-any-return]

    def sampled() -> Tensor:
        # Its DDIM makes one pass less than the number of timesteps that it is given.
        return whole.p_sample_loop(  # type: ignore[no-any-return]
            tuple(x.shape), text_cond=given, cond_scale=shape.guidance, timesteps=shape.steps + 1
        )

    return _contestant(network, run, target, sampled, parameters, f"feed-forward layers {mult:g} times as wide")


def decoder(shape: UNetShape, parameters: int, device: torch.device) -> Contestant:
    """Self-attention where ours has it; width and context width are searched for equal parameters."""
    levels = len(shape.widths)

    def build(dim: int, context: int) -> nn.Module:
        return _unet(
            shape,
            dim,
            cond_dim=context,
            self_attn=(False,) + (True,) * (levels - 1),
            image_embed_dim=shape.embedding,
            text_embed_dim=shape.embedding,
            max_text_len=shape.tokens,
            cond_on_text_encodings=True,
            cond_on_image_embeds=True,
            channels_out=6,
        )

    found = _nearest(lambda pair: build(*pair), _pairs(shape), parameters)
    torch.manual_seed(0)
    sizes = {"image_size": shape.image, "timesteps": 1000, "sample_timesteps": shape.steps}
    whole = peer.Decoder(unet=build(*found), **sizes).to(device).eval().requires_grad_(False)
    network, text = whole.unets[0], captions(shape.batch, shape.tokens, shape.embedding).to(device)
    image = rand(shape.batch, shape.embedding, seed=3).to(device)
    given = {"image_embed": image, "text_encodings": text.tokens * text.mask[..., None]}
    x = rand(shape.batch, 3, shape.image, shape.image, seed=7).to(device)
    target = rand(shape.batch, 6, shape.image, shape.image, seed=8).to(device)
    t = timesteps(shape.batch).to(device)

    def run(net: nn.Module) -> Tensor:
        return net(x, t, **given)  # type: ignore[no-any-return]

    def sampled() -> Tensor:
        return whole.sample(**given, cond_scale=shape.guidance)  # type: ignore[no-any-return]

    return _contestant(network, run, target, sampled, parameters, f"dim {found[0]}, cond_dim {found[1]}")


def upsampler(shape: UNetShape, parameters: int, device: torch.device) -> Contestant:
    """No attention, conditioned on the enlarged image alone; `sample_loop` without its other stage."""

    def build(dim: int, context: int) -> nn.Module:
        options = {"cond_dim": context, "self_attn": False, "attend_at_middle": False, "lowres_cond": True}
        return _unet(shape, dim, **options)

    found = _nearest(lambda pair: build(*pair), _pairs(shape), parameters)
    torch.manual_seed(0)
    network = build(*found).to(device).eval().requires_grad_(False)
    # A cascade of two, of which the first is never used: only in a cascade is an upsampler one.
    first = peer.Unet(dim=8, dim_mults=(1,), image_embed_dim=8, cond_on_image_embeds=True)
    sizes = {"image_sizes": (shape.image // 4, shape.image), "timesteps": 1000}
    whole = peer.Decoder(unet=(first, network), **sizes).to(device).eval().requires_grad_(False)
    network = whole.unets[1]
    low = rand(shape.batch, 3, shape.image, shape.image, seed=6).clamp(-1, 1).to(device)
    x = rand(shape.batch, 3, shape.image, shape.image, seed=7).to(device)
    target = rand(shape.batch, 3, shape.image, shape.image, seed=8).to(device)
    t = timesteps(shape.batch).to(device)

    def run(net: nn.Module) -> Tensor:
        return net(x, t, image_embed=None, lowres_cond_img=low)  # type: ignore[no-any-return]

    def sampled() -> Tensor:
        return whole.p_sample_loop(  # type: ignore[no-any-return]
            network,
            tuple(x.shape),
            image_embed=None,
            noise_scheduler=whole.noise_schedulers[1],
            lowres_cond_img=(low + 1) / 2,
            timesteps=shape.steps,
        )

    return _contestant(network, run, target, sampled, parameters, f"dim {found[0]}, cond_dim {found[1]}")


def _unet(shape: UNetShape, dim: int, **options: Any) -> nn.Module:
    mults = tuple(max(1, round(width / shape.widths[0])) for width in shape.widths)
    heads = {"attn_heads": max(1, shape.widths[-1] // shape.head_dim), "attn_dim_head": shape.head_dim}
    return peer.Unet(dim=dim, dim_mults=mults, num_resnet_blocks=shape.blocks, **heads, **options)  # type: ignore[no-any-return]


def _pairs(shape: UNetShape) -> list[tuple[int, int]]:
    """Widths around ours, in the steps that its groups allow, and widths of the context tokens."""
    top = shape.widths[0]
    dims = range(max(8, top // 2 // 8 * 8), 2 * top + 1, 8)
    return [(dim, context) for dim in dims for context in range(16, max(shape.context, 64) * 2 + 1, 16)]


def _nearest(build: Callable[[Any], nn.Module], choices: Iterable[Any], parameters: int) -> Any:
    """The choice whose network comes nearest to `parameters`. Raises RuntimeError where none is within 2 %.

    The number of parameters grows with every choice's last number, so that each run of choices that differ in it alone
    is searched by halving.
    """
    runs: dict[Any, list[Any]] = {}
    for choice in choices:
        runs.setdefault(choice[:-1] if isinstance(choice, tuple) else (), []).append(choice)
    counted: dict[Any, int] = {}

    def count(choice: Any) -> int:
        if choice not in counted:
            with torch.device("meta"):
                counted[choice] = parameters_of(build(choice))
        return counted[choice]

    for run in runs.values():
        low, high = 0, len(run) - 1
        if count(run[low]) > parameters * (1 + PARAMETERS_WITHIN) or count(run[high]) < parameters:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(run[middle]) < parameters else (low, middle)
    best = min(counted, key=lambda choice: abs(counted[choice] - parameters))
    if abs(counted[best] / parameters - 1) > PARAMETERS_WITHIN:
        raise RuntimeError(
            f"no network of dalle2-pytorch has {parameters:,} parameters within {PARAMETERS_WITHIN:.0%}; the nearest, "
            f"{best}, has {counted[best]:,}"
        )
    return best


def _contestant(
    network: nn.Module,
    run: Callable[[nn.Module], Tensor],
    target: Tensor,
    sampled: Callable[[], Tensor],
    parameters: int,
    shape: str,
) -> Contestant:
    own = parameters_of(network)
    note = f"dalle2-pytorch: {own:,} parameters, {own / parameters - 1:+.1%} of ours ({shape})"
    works = {
        "forward": torch.inference_mode()(lambda: run(network)),
        "training step": training_step(network, run, target),
        "sampling": sampled,
    }
    return Contestant("dalle2-pytorch", own, works, notes=[note])
