"""Golden files for tests/test_interop_dalle2_*.py, made by a release of DALLE2-pytorch itself.

Not part of the suite. In an environment with that release and this folder's torch and NumPy:

    python tests/make_dalle2_goldens.py tests/data/dalle2

writes prior_<version>.npz, decoder_<version>.npz and cascade_<version>.npz: for each configuration of helpers_dalle2
the names and shapes of the model's tensors, its schedule, and its outputs with and without its conditions; of enlarging
U-Nets also the pictures of all their steps, where the release can begin with them. With `cascade` behind the folder the
last file alone is written.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import helpers_dalle2 as h
from dalle2_pytorch import dalle2_pytorch as package
from dalle2_pytorch.version import __version__


def filled(
    model: torch.nn.Module, weights: Callable[..., dict[str, torch.Tensor]] = h.weights
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    own = model.state_dict()
    tables = {n: v for n, v in own.items() if "noise_scheduler" in n or n.endswith("rotary_emb.freqs")}
    shapes = {n: list(v.shape) for n, v in own.items()}
    model.load_state_dict(weights(shapes, tables))
    return shapes, {n: v.numpy() for n, v in tables.items() if n.endswith(("freqs", ".betas"))}


@torch.no_grad()
def priors() -> dict[str, Any]:
    out: dict[str, Any] = {}
    tokens, _, text = h.caption()
    for name, config in h.PRIORS.items():
        body = dict(config)
        net = package.DiffusionPriorNetwork(**body.pop("net"))
        model = package.DiffusionPrior(net, **body).eval()
        shapes, tables = filled(model)
        x = h.drawn("x_t", (h.BATCH, h.CLIP_DIM))
        given = {"text_embed": text, "text_encodings": tokens}
        out[f"{name}/conditional"] = net(x, h.TIMES, **given).numpy()
        out[f"{name}/guided"] = net.forward_with_cond_scale(x, h.TIMES, cond_scale=3.0, **given).numpy()
        out[f"{name}/shapes"] = json.dumps(shapes)
        out |= {f"{name}/table/{n}": v for n, v in tables.items()}
    return out


@torch.no_grad()
def decoders() -> dict[str, Any]:
    out: dict[str, Any] = {}
    tokens, _, _ = h.caption()
    new = tuple(map(int, __version__.split(".")[:2])) >= (1, 9)
    configs = dict(h.DECODERS)
    if new:
        configs["cosine"] = {**h.DECODERS["plain"], "unets": [{**h.DECODERS["plain"]["unets"][0], **h.COSINE}]}
    for name, config in configs.items():
        body = dict(config)
        # Some releases cannot compare a U-Net with what it should be; one that is to be rebuilt is not compared.
        unets = [
            package.Unet(**{**unet, "cond_on_image_embeds": True, "lowres_cond": True}) for unet in body.pop("unets")
        ]
        model = package.Decoder(
            tuple(unets), **{k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
        ).eval()
        shapes, tables = filled(model)
        x = h.drawn("x_t", (h.BATCH, 3, 8, 8))
        given = {"image_embed": h.image_embedding()}
        if config["unets"][0]["cond_on_text_encodings"]:
            given["text_encodings"] = tokens
        unet = model.unets[0]
        out[f"{name}/conditional"] = unet(x, h.TIMES, **given).numpy()
        out[f"{name}/null"] = unet(x, h.TIMES, **given, image_cond_drop_prob=1.0, text_cond_drop_prob=1.0).numpy()
        out[f"{name}/shapes"] = json.dumps(shapes)
        out |= {f"{name}/table/{n}": v for n, v in tables.items()}
    return out


@torch.no_grad()
def cascades() -> dict[str, Any]:
    out: dict[str, Any] = {}
    tokens, _, _ = h.caption()
    for name, config in h.CASCADES.items():
        body = dict(config)
        # As above: what is to be rebuilt is not compared.
        unets = [
            package.Unet(**{**unet, "cond_on_image_embeds": True, "lowres_cond": number == 0})
            for number, unet in enumerate(body.pop("unets"))
        ]
        body = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
        model = package.Decoder(tuple(unets), **body).eval()
        shapes, tables = filled(model, h.cascade_weights)
        out[f"{name}/shapes"] = json.dumps(shapes)
        out |= {f"{name}/table/{n}": v for n, v in tables.items() if n.startswith("noise_schedulers")}
        given = {"image_embed": h.image_embedding(), "text_encodings": tokens}
        for number, size in enumerate(config["image_sizes"][1:], 1):
            unet, low = model.unets[number], h.low_res(size // 2)
            enlarged = package.resize_image_to(low, size, nearest=True)
            told = {"lowres_noise_level": h.LEVELS} if config.get("use_noise_for_lowres_cond") else {}
            x = h.drawn(f"x_t {size}", (h.BATCH, 3, size, size))
            for key, drop in (("conditional", 0.0), ("null", 1.0)):
                dropped = {"image_cond_drop_prob": drop, "text_cond_drop_prob": drop}
                result = unet(x, h.ENLARGED_TIMES, lowres_cond_img=enlarged, **given, **told, **dropped)
                out[f"{name}/{number}/{key}"] = result.numpy()
            if "start_at_unet_number" in inspect.getsource(package.Decoder):  # `sample` is decorated
                out[f"{name}/{number}/sampled"] = drawn_pictures(model, name, number, (low + 1) / 2, given).numpy()
    return out


def drawn_pictures(
    model: torch.nn.Module, name: str, number: int, image: torch.Tensor, given: dict[str, Any]
) -> torch.Tensor:
    """One enlarging U-Net's pictures in [-1, 1] by all steps, from noise that hangs on names."""
    count = 0

    def like(x: torch.Tensor, **_: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return h.drawn(f"{name} {number} noise {count}", x.shape)

    def start(shape: Any, **_: Any) -> torch.Tensor:
        return h.drawn(f"{name} {number} x_T", shape)

    with patch.object(torch, "randn_like", like), patch.object(torch, "randn", start):
        drawn: torch.Tensor = model.sample(
            image=image, start_at_unet_number=number + 1, stop_at_unet_number=number + 1, **given
        )
    return drawn * 2 - 1


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"cascade_{__version__}.npz", **cascades())
    if sys.argv[2:] != ["cascade"]:
        np.savez_compressed(folder / f"prior_{__version__}.npz", **priors())
        np.savez_compressed(folder / f"decoder_{__version__}.npz", **decoders())
    print(__version__, "written to", folder)
