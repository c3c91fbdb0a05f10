"""Karlo as it was published: `*.ckpt` of prior, decoder and super-resolution, and the CLIP statistics beside them.

Their networks are guided-diffusion's and CLIP's under those names; attention keeps query, key and value of a head
together (rows of 64), where diffusers and we keep all queries, then all keys. Which file is which is read from its
tensors, not from its name. The CLIP is OpenAI's ViT-L/14, which these files do not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from decoder import DecoderConfig
from prior import PriorConfig
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.interop.clip_part import KARLO_CLIP, write_named_clip
from unclip.interop.containers import read_torch
from unclip.interop.decoder import decoder_from_diffusers
from unclip.interop.karlo import ConvertOptions, told
from unclip.interop.prior import prior_from_diffusers
from unclip.interop.super_resolution import Model, upsampler_from_diffusers
from unclip.interop.unet import modules_of, unet_config_to_diffusers
from unclip.nn import UNetConfig
from upsamplers import UpsamplerConfig

SUFFIXES = (".ckpt", ".th", ".pt", ".pth")
_HEAD = 64
_CLIP_RANGE = 10.0  # Karlo's own sampler; the scheduler of diffusers' folder says 5
# Which tensor only one of the three files has.
_SIGNS = {
    "prior": "model.prd_emb",
    "decoder": "model.cf_param",
    "upsampler_256": "model_first_steps.input_blocks.0.0.weight",
}
PRIOR = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "clip_img_proj": "proj_in",
    "text_emb_proj": "embedding_proj",
    "text_enc_proj": "encoder_hidden_states_proj",
    "final_ln": "norm_out",
    "out_proj": "proj_to_clip_embeddings",
}
PRIOR_BLOCK = {
    "ln_1": "norm1",
    "attn.c_proj": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}
PROJECTION = {
    "text_feat_proj": "embedding_proj",
    "clip_emb": "clip_image_embeddings_project_to_time_embeddings",
    "clip_tok_proj": "clip_extra_context_tokens_proj",
    "text_seq_proj.0": "encoder_hidden_states_proj",
    "text_seq_proj.1": "text_encoder_hidden_states_norm",
}
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_KINDS = ("weight", "bias")


class OriginalKarlo:
    """A folder of the published files. Prior and statistics belong together; without either there is no prior."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.files, self.statistics = found_files(self.folder)
        if ("prior" in self.files) != (self.statistics is not None):
            missing = "the CLIP statistics (ViT-L-14_stats.th)" if self.statistics is None else "the prior's checkpoint"
            raise UnclipError(f"{self.folder} is incomplete: {missing} is missing, and one needs the other")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in _SIGNS if part in self.files)

    def part(
        self, name: str, null: TextFeatures | None, *, weights: bool
    ) -> tuple[PriorConfig | DecoderConfig | UpsamplerConfig, dict[str, Tensor]]:
        state = read_checkpoint(self.files[name])
        if not weights:
            state = {key: tensor.to("meta") for key, tensor in state.items()}
        with told(self.files[name]):
            if name == "prior":
                assert self.statistics is not None
                return _prior(state, self.statistics, null)
            if name == "decoder":
                return _decoder(state, null)
            networks = [_network(state, prefix) for prefix in ("model_first_steps.", "model_last_step.")]
            return upsampler_from_diffusers(*networks)

    def write_clip(self, folder: Path, options: ConvertOptions) -> None:
        write_named_clip(folder, options.clip or KARLO_CLIP, options.dtype)

    def origin(self) -> dict[str, Any]:
        return {"layout": "karlo", "from": sorted(file.name for file in self.files.values())}


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The state dict of a `.ckpt`. UnclipError: there is none in it."""
    body = read_torch(file)
    state = body.get("state_dict", body) if isinstance(body, dict) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UnclipError(f"{file} holds no state_dict of tensors")
    return {str(name): tensor for name, tensor in state.items()}


def found_files(folder: Path) -> tuple[dict[str, Path], tuple[Tensor, Tensor] | None]:
    """The published files by part, and the statistics (mean, deviation), each (E,)."""
    files: dict[str, Path] = {}
    statistics: tuple[Tensor, Tensor] | None = None
    for file in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()):
        if file.suffix == ".pt":  # OpenAI's own file of the CLIP, which is a program
            continue
        body = read_torch(file)
        if isinstance(body, (tuple, list)) and len(body) == 2 and all(isinstance(one, Tensor) for one in body):
            statistics = body[0].flatten(), body[1].flatten()
        elif isinstance(body, dict):
            names = body.get("state_dict", body)
            for part, sign in _SIGNS.items():
                if isinstance(names, Mapping) and sign in names:
                    files[part] = file
    return files, statistics


def _prior(
    state: Mapping[str, Tensor], statistics: tuple[Tensor, Tensor], null: TextFeatures | None
) -> tuple[PriorConfig, dict[str, Tensor]]:
    width, dim = state["model.out_proj.weight"].shape[::-1]
    blocks = {int(name.split(".")[3]) for name in state if name.startswith("model.transformer.resblocks.")}
    theirs: dict[str, Tensor] = {
        "positional_embedding": state["model.positional_embedding"],
        "prd_embedding": state["model.prd_emb"],
        "clip_mean": statistics[0][None],
        "clip_std": statistics[1][None],
    }
    for kind in _KINDS:
        theirs |= {f"{there}.{kind}": state[f"model.{ours}.{kind}"] for ours, there in PRIOR.items()}
        for block in blocks:
            here, there = f"model.transformer.resblocks.{block}", f"transformer_blocks.{block}"
            theirs |= {f"{there}.{b}.{kind}": state[f"{here}.{a}.{kind}"] for a, b in PRIOR_BLOCK.items()}
            parts = _by_head(state[f"{here}.attn.c_qkv.{kind}"], 3)
            theirs |= {f"{there}.attn1.to_{one}.{kind}": tensor for one, tensor in zip("qkv", parts, strict=True)}
    config = {
        "num_attention_heads": width // _HEAD,
        "attention_head_dim": _HEAD,
        "num_layers": len(blocks),
        "embedding_dim": dim,
        "num_embeddings": state["model.positional_embedding"].shape[-2] - 4,
    }
    return prior_from_diffusers(theirs, config, null, clip_range=_CLIP_RANGE)


def _decoder(state: Mapping[str, Tensor], null: TextFeatures | None) -> tuple[DecoderConfig, dict[str, Tensor]]:
    outside = tuple(f"model.{name}." for name in PROJECTION)
    own = {key: value for key, value in state.items() if not key.startswith((*outside, "model.cf_param"))}
    unet = _network(own, "model.")
    projection: dict[str, Tensor] = {"learned_classifier_free_guidance_embeddings": state["model.cf_param"]}
    for kind in _KINDS:
        projection |= {f"{there}.{kind}": state[f"model.{ours}.{kind}"] for ours, there in PROJECTION.items()}
    context, dim = state["model.text_seq_proj.0.weight"].shape[0], state["model.clip_emb.weight"].shape[1]
    tokens = state["model.clip_tok_proj.weight"].shape[0] // context
    described = {"clip_embeddings_dim": dim, "cross_attention_dim": context, "clip_extra_context_tokens": tokens}
    return decoder_from_diffusers(unet, (projection, described), null)


def _network(state: Mapping[str, Tensor], prefix: str) -> Model:
    """One U-Net below `prefix` as diffusers names it, its shape read from the tensors."""
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not own:
        raise UnclipError(f"no network {prefix.rstrip('.')!r} in it")
    config, context = _unet_config(own), own.get("middle_block.1.encoder_kv.weight")
    channels = own["input_blocks.0.0.weight"].shape[1], own["out.2.weight"].shape[0]
    body = unet_config_to_diffusers(config, *channels, None if context is None else context.shape[1])
    theirs: dict[str, Tensor] = {}
    for ours, there, sort in modules_of(config):
        here = original_name(ours, f"{ours.rsplit('.', 1)[0]}.attention" in _attending(config))
        for kind in _KINDS:
            if sort == "plain":
                theirs[f"{there}.{kind}"] = own[f"{here}.{kind}"]
            elif sort == "residual":
                for a, b in RESIDUAL.items():
                    if f"{here}.{a}.{kind}" in own:
                        theirs[f"{there}.{b}.{kind}"] = own[f"{here}.{a}.{kind}"]
            else:
                for a, names in (("qkv", ("to_q", "to_k", "to_v")), ("encoder_kv", ("add_k_proj", "add_v_proj"))):
                    parts = _by_head(_flat(own[f"{here}.{a}.{kind}"]), len(names))
                    theirs |= {f"{there}.{b}.{kind}": part for b, part in zip(names, parts, strict=True)}
                theirs[f"{there}.group_norm.{kind}"] = own[f"{here}.norm.{kind}"]
                theirs[f"{there}.to_out.0.{kind}"] = _flat(own[f"{here}.proj_out.{kind}"])
    return theirs, body


def _attending(config: UNetConfig) -> set[str]:
    return {ours for ours, _, sort in modules_of(config) if sort == "attention"}


def original_name(ours: str, attends: bool) -> str:
    """guided-diffusion's name of one of our modules; `attends`: there is attention in its block."""
    plain = {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
    if ours in plain or ours.startswith("time_embed"):
        return plain.get(ours, ours)
    where, *rest = ours.split(".")
    if where == "middle":
        return f"middle_block.{ {'first': 0, 'attention': 1, 'last': 2 if attends else 1}[rest[0]] }"
    place = {"res": 0, "attention": 1, "resample": 2 if attends else 1}[rest[1]]
    return f"input_blocks.{int(rest[0]) + 1}.{place}" if where == "down" else f"output_blocks.{rest[0]}.{place}"


def _unet_config(own: Mapping[str, Tensor]) -> UNetConfig:
    """Widths, blocks a level and where attention stands. A level up has n + 1 blocks, the last of which enlarges; a
    level down has n and one that reduces, save the lowest.
    """
    blocks = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("input_blocks."))
    ups = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("output_blocks."))
    widths = [own[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in range(1, blocks)]
    base = own["input_blocks.0.0.weight"].shape[0]
    levels = 1 + sum(_resamples(own, number) for number in range(ups))
    each = ups // levels - 1
    if (each + 1) * levels != ups or blocks != (each + 1) * levels:
        raise UnclipError(f"{blocks - 1} blocks down and {ups} up are no U-Net of equal levels")
    size, starts = 64, [level * (each + 1) for level in range(levels)]
    attends = [f"input_blocks.{start + 1}.1.qkv.weight" in own for start in starts]
    middle = "middle_block.1.qkv.weight" in own
    embedding = own["time_embed.2.weight"].shape[0]
    shift = own["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    if embedding != 4 * base:
        raise UnclipError(f"its timestep embedding is {embedding} wide; expected {4 * base}")
    mult = [widths[start] / base for start in starts]
    return parse_config(
        UNetConfig,
        {
            "image_size": size if any(attends) or middle else 4 * size,
            "model_channels": base,
            "channel_mult": [int(one) if one == int(one) else one for one in mult],
            "num_res_blocks": each,
            "attention_resolutions": [size // 2**level for level, cross in enumerate(attends) if cross],
            "middle_attention": None if middle == attends[-1] else middle,
            **({"head_channels": _HEAD} if any(attends) or middle else {}),
            "scale_shift_norm": shift,
        },
        origin="the original U-Net",
    )


def _resamples(own: Mapping[str, Tensor], block: int) -> bool:
    return any(f"output_blocks.{block}.{place}.in_layers.0.weight" in own for place in (1, 2))


def _by_head(joint: Tensor, count: int) -> Sequence[Tensor]:
    """Rows of one head after the other, `count` kinds in each -> a tensor of every kind."""
    heads = joint.unflatten(0, (-1, count, _HEAD))
    return [heads[:, number].flatten(0, 1) for number in range(count)]


def _flat(weight: Tensor) -> Tensor:
    """A 1×1 convolution's weight as a linear layer's."""
    return weight.flatten(1) if weight.ndim > 1 else weight
