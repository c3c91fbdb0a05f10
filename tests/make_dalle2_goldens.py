"""Golden files for tests/test_interop_dalle2_*.py, made by a release of DALLE2-pytorch itself.

Not part of the suite. In an environment with that release and this folder's torch and NumPy:

    python tests/make_dalle2_goldens.py tests/data/dalle2

writes prior_<version>.npz and decoder_<version>.npz: for each configuration of helpers_dalle2 the names and shapes of
the model's tensors, its schedule, and its outputs with and without its conditions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import helpers_dalle2 as h
from dalle2_pytorch import dalle2_pytorch as package
from dalle2_pytorch.version import __version__


def filled(model: torch.nn.Module) -> tuple[dict[str, list[int]], dict[str, Any]]:
    own = model.state_dict()
    tables = {n: v for n, v in own.items() if n.startswith("noise_scheduler") or n.endswith("rotary_emb.freqs")}
    shapes = {n: list(v.shape) for n, v in own.items()}
    model.load_state_dict(h.weights(shapes, tables))
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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"prior_{__version__}.npz", **priors())
    np.savez_compressed(folder / f"decoder_{__version__}.npz", **decoders())
    print(__version__, "written to", folder)
