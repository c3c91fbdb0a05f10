"""A tiny Karlo of random weights in diffusers' layout, the same from run to run and in every release of diffusers."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIM, HEADS, LENGTH, MERGES = 32, 2, 77, 400
SIZE = 64  # of the decoder's pictures; super-resolution makes four times that
LIBRARIES = {
    "prior": ("diffusers", "PriorTransformer"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "text_proj": ("unclip", "UnCLIPTextProjModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "prior_scheduler": {"prediction_type": "sample", "clip_sample_range": 5.0},
    "decoder_scheduler": {"variance_type": "learned_range"},
    "super_res_scheduler": {},
}
TEXT = {
    "hidden_size": DIM,
    "intermediate_size": 64,
    "projection_dim": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "vocab_size": MERGES + 514,
    "bos_token_id": MERGES + 512,
    "eos_token_id": MERGES + 513,
    "pad_token_id": 0,
}
IMAGE = {**{name: TEXT[name] for name in ("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers")},
         "num_attention_heads": HEADS, "image_size": 32, "patch_size": 16}  # fmt: skip


def make_karlo(root: Path, size: int = SIZE, variations: bool = False) -> Path:
    """The folder of `karlo-v1-alpha`; with `variations` that of its image-variations repository, which has an image
    encoder and no prior."""
    root.mkdir(parents=True)
    libraries = dict(LIBRARIES)
    if variations:
        libraries.pop("prior")
        libraries.pop("prior_scheduler")
        libraries["image_encoder"] = ("transformers", "CLIPVisionModelWithProjection")
        libraries["feature_extractor"] = ("transformers", "CLIPImageProcessor")
    for name, network in networks(size).items():
        if name in libraries:
            network.save_pretrained(root / name)
    for name, body in SCHEDULERS.items():
        if name in libraries:
            write(root / name / "scheduler_config.json", {"_class_name": "UnCLIPScheduler", **body})
    write_tokenizer(root / "tokenizer")
    if variations:
        side = IMAGE["image_size"]
        body = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, "crop_size": side}
        write(root / "feature_extractor" / "preprocessor_config.json", body)
    kind = "UnCLIPImageVariationPipeline" if variations else "UnCLIPPipeline"
    write(root / "model_index.json", {"_class_name": kind, "_diffusers_version": "0.37.1", **libraries})
    return root


def networks(size: int = SIZE) -> dict[str, Any]:
    """Every network of both repositories, with weights that depend on their names alone."""
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    prior = PriorTransformer(
        num_attention_heads=HEADS, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    )
    decoder = UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=16,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    found = {
        "prior": prior,
        "decoder": decoder,
        "text_proj": projection_class()(clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=24),
        "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)),
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE)),
    }
    for name in ("super_res_first", "super_res_last"):
        found[name] = UNet2DModel(
            sample_size=4 * size if name.endswith("first") else None,  # as in the published folder
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=1,
            add_attention=False,
        )
    for name, network in found.items():
        _fill(network, name)
    return found


def projection_class() -> Any:
    """diffusers has moved it to its deprecated pipelines."""
    try:
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    except ImportError:
        from diffusers.pipelines.unclip.text_proj import UnCLIPTextProjModel
    return UnCLIPTextProjModel


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(file: Path, body: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(body, indent=2), encoding="utf-8")


def write_tokenizer(folder: Path, merges: int = MERGES) -> None:
    """The commonest merges of CLIP's vocabulary as Hugging Face's CLIPTokenizer keeps them; "!" pads, as in Karlo."""
    from unclip.clip import byte_alphabet, default_vocabulary

    kept, letters = default_vocabulary()[:merges], byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in kept)]
    special = ("<|startoftext|>", "<|endoftext|>")
    write(folder / "vocab.json", {token: number for number, token in enumerate([*tokens, *special])})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(kept) + "\n", encoding="utf-8")
    names = {"bos_token": special[0], "eos_token": special[1], "unk_token": special[1], "pad_token": "!"}
    write(folder / "special_tokens_map.json", names)
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **names},
    )


def _fill(network: nn.Module, name: str) -> None:
    network.eval().requires_grad_(False)
    for key, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not tensor.is_floating_point() or "causal" in key:
            continue
        value = noise(zlib.crc32(f"{name}.{key}".encode()), *tensor.shape)
        if key.endswith("clip_std"):
            value = 1 + 0.2 * value.abs()
        elif "norm" in key and key.endswith("weight"):
            value = 1 + 0.1 * value
        elif tensor.ndim == 1 or key.endswith(("bias", "clip_mean")):
            value = 0.1 * value
        elif "embedding" in key and "proj" not in key and "time" not in key:
            value = 0.5 * value
        else:
            value = value * 0.8 / math.sqrt(tensor[0].numel())
        if key.startswith("conv_out"):  # guidance would blow up every rounding error of a network of noise
            value = 0.04 * value
        tensor.copy_(value)
