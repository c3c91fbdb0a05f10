"""Karlo's original checkpoints, other people's folders that are not whole, and files that must not be unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from helpers_karlo import make_karlo, noise, projection_class
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip import UnCLIP
from unclip.errors import UnclipError
from unclip.interop.clip_part import write_clip
from unclip.interop.clip_towers import clip_from_transformers
from unclip.interop.decoder import decoder_to_diffusers
from unclip.interop.detect import convert, detect
from unclip.interop.karlo import ConvertOptions
from unclip.interop.karlo_original import OriginalKarlo, read_checkpoint
from unclip.interop.prior import prior_to_diffusers
from unclip.interop.super_resolution import upsampler_to_diffusers

DIM, HEAD = 128, 64
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PRIOR = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
}
_BLOCK = {
    "norm1": "ln_1",
    "norm3": "ln_2",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
    "attn1.to_out.0": "attn.c_proj",
}
_PROJECTION = {
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
}


def interleaved(*parts: Tensor) -> Tensor:
    """Per head of 64 rows first the queries, then the keys, …, as Karlo's attention keeps them."""
    heads = [part.reshape(-1, HEAD, *part.shape[1:]) for part in parts]
    return torch.stack(heads, dim=1).reshape(-1, *parts[0].shape[1:])


def original_prior(theirs: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    found = {"positional_embedding": theirs["positional_embedding"], "prd_emb": theirs["prd_embedding"]}
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": theirs[f"{there}.{kind}"] for there, ours in _PRIOR.items()}
        for n in range(blocks):
            before = f"transformer_blocks.{n}"
            for there, ours in _BLOCK.items():
                found[f"transformer.resblocks.{n}.{ours}.{kind}"] = theirs[f"{before}.{there}.{kind}"]
            parts = [theirs[f"{before}.attn1.to_{one}.{kind}"] for one in "qkv"]
            found[f"transformer.resblocks.{n}.attn.c_qkv.{kind}"] = interleaved(*parts)
    return {f"model.{name}": tensor for name, tensor in found.items()}


def original_unet(network: Any, prefix: str) -> dict[str, Tensor]:
    """guided-diffusion's numbering: every block and resampler down has a number of its own, up they share it."""
    theirs = network.state_dict()
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    number = 1
    for level, block in enumerate(network.down_blocks):
        for n in range(len(block.resnets)):
            places[f"down_blocks.{level}.resnets.{n}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{n}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            places[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    attends = "mid_block.attentions.0.to_q.weight" in theirs
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places["mid_block.resnets.1"] = f"middle_block.{2 if attends else 1}"
    number = 0
    for level, block in enumerate(network.up_blocks):
        cross = f"up_blocks.{level}.attentions.0.to_q.weight" in theirs
        for n in range(len(block.resnets)):
            places[f"up_blocks.{level}.resnets.{n}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{level}.attentions.{n}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers is not None:
            places[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if cross else 1}"
    found: dict[str, Tensor] = {}
    for there, ours in places.items():
        for kind in ("weight", "bias"):
            if f"{there}.{kind}" in theirs:
                found[f"{ours}.{kind}"] = theirs[f"{there}.{kind}"]
            for a, b in _RESIDUAL.items():
                if f"{there}.{a}.{kind}" in theirs:
                    found[f"{ours}.{b}.{kind}"] = theirs[f"{there}.{a}.{kind}"]
            if f"{there}.to_q.{kind}" in theirs:
                own = [theirs[f"{there}.to_{one}.{kind}"] for one in "qkv"]
                context = [theirs[f"{there}.add_{one}_proj.{kind}"] for one in "kv"]
                wide = (lambda one: one[..., None]) if kind == "weight" else (lambda one: one)
                found[f"{ours}.qkv.{kind}"] = wide(interleaved(*own))
                found[f"{ours}.encoder_kv.{kind}"] = wide(interleaved(*context))
                found[f"{ours}.proj_out.{kind}"] = wide(theirs[f"{there}.to_out.0.{kind}"])
                found[f"{ours}.norm.{kind}"] = theirs[f"{there}.group_norm.{kind}"]
    return {prefix + name: tensor for name, tensor in found.items()}


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    torch.manual_seed(0)
    levels: dict[str, Any] = {"block_out_channels": (64, 128), "layers_per_block": 2}
    plain: dict[str, Any] = {
        **levels,
        "sample_size": 256,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "add_attention": False,
    }
    return {
        "prior": PriorTransformer(
            num_attention_heads=2, attention_head_dim=HEAD, num_layers=2, embedding_dim=DIM, num_embeddings=77
        ),
        "decoder": UNet2DConditionModel(
            **levels,
            sample_size=64,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=24,
            attention_head_dim=HEAD,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        ),
        "text_proj": projection_class()(clip_embeddings_dim=DIM, time_embed_dim=256, cross_attention_dim=24),
        "first": UNet2DModel(**plain),
        "last": UNet2DModel(**plain),
    }


@pytest.fixture(scope="module")
def folder(theirs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four published files, under names that tell nothing."""
    root = tmp_path_factory.mktemp("original")
    torch.save({"state_dict": original_prior(theirs["prior"].state_dict(), 2), "step": 7}, root / "a.ckpt")
    projection = theirs["text_proj"].state_dict()
    decoder = original_unet(theirs["decoder"], "model.")
    decoder["model.cf_param"] = projection["learned_classifier_free_guidance_embeddings"]
    for kind in ("weight", "bias"):
        decoder |= {f"model.{ours}.{kind}": projection[f"{there}.{kind}"] for there, ours in _PROJECTION.items()}
    torch.save({"state_dict": decoder}, root / "b.ckpt")
    both = {**original_unet(theirs["first"], "model_first_steps."), **original_unet(theirs["last"], "model_last_step.")}
    torch.save({"state_dict": both}, root / "c.ckpt")
    torch.save((noise(1, DIM), 1 + noise(2, DIM).abs()), root / "stats.th")
    return root


def test_every_tensor_comes_to_its_place(theirs: dict[str, Any], folder: Path) -> None:
    original = OriginalKarlo(folder)
    assert original.parts == ("prior", "decoder", "upsampler_256")
    found = {name: original.part(name, None, weights=True) for name in original.parts}
    config, state = found["prior"]
    _, prior = prior_to_diffusers(config, state)  # type: ignore[arg-type]
    assert config.clip_range == 10.0  # type: ignore[union-attr]
    assert torch.equal(prior.pop("clip_mean")[0], noise(1, DIM)) and prior.pop("clip_std").min() >= 1
    unet, projection = decoder_to_diffusers(*found["decoder"])  # type: ignore[arg-type]
    first, last = upsampler_to_diffusers(*found["upsampler_256"])  # type: ignore[arg-type]
    assert last is not None and not found["upsampler_256"][0].clamp_condition  # type: ignore[union-attr]
    pairs = {"prior": prior, "decoder": unet[0], "text_proj": projection[0], "first": first[0], "last": last[0]}
    for name, tensors in pairs.items():
        before = {key: one for key, one in theirs[name].state_dict().items() if not key.startswith("clip_")}
        if name == "text_proj":
            before = theirs[name].state_dict()
        assert set(tensors) >= set(before), name
        assert all(torch.equal(tensors[key], one) for key, one in before.items()), name
    for name, (own, _) in {"decoder": found["decoder"], "upsampler_256": found["upsampler_256"]}.items():
        size = own.unet.image_size  # type: ignore[union-attr]
        assert size == {"decoder": 64, "upsampler_256": 256}[name]


def test_the_benchmark_writes_the_same_files(theirs: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """From shards in diffusers' layout, as `python -m benchmarks conversion` converts them."""
    from benchmarks import conversion

    names = {"first": "super_res_first", "last": "super_res_last"}
    for name, network in theirs.items():
        network.save_pretrained(tmp_path / "there" / names.get(name, name))
    conversion.into_shards(tmp_path / "there" / "decoder", 2**20)
    assert len(list((tmp_path / "there" / "decoder").glob("*-of-*.safetensors"))) > 1
    conversion.write_original(tmp_path / "there", tmp_path / "files")
    written, found = OriginalKarlo(tmp_path / "files"), OriginalKarlo(folder)
    assert written.parts == found.parts
    for part in found.parts:
        ours, other = (read_checkpoint(one.files[part]) for one in (found, written))
        assert ours.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in ours.items()), part


def test_original_files_become_a_bundle(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=DIM, intermediate_size=DIM, projection_dim=DIM, num_hidden_layers=1, num_attention_heads=2
    )
    clip = clip_from_transformers((CLIPTextModelWithProjection(config).state_dict(), config.to_dict()), None)
    write_clip(tmp_path / "clip", *clip, None, {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}, sees=False)
    assert convert([folder], tmp_path / "out", ConvertOptions(clip=str(tmp_path / "clip"))).name == "karlo-original"
    model = UnCLIP.from_pretrained(tmp_path / "out", size=64)
    pictures = model.sample("a red apple", prior_steps=1, decoder_steps=1, output="tensor")
    assert pictures.shape == (1, 3, 64, 64) and model.sizes == (64,)
    assert json.loads((tmp_path / "out" / "unclip.json").read_text())["source"]["layout"] == "karlo"


def test_files_that_belong_together(folder: Path, tmp_path: Path) -> None:
    lonely = shutil.copytree(folder, tmp_path / "lonely")
    (lonely / "stats.th").unlink()
    with pytest.raises(UnclipError, match=r"incomplete as Karlo's original.*found .*missing the CLIP statistics"):
        detect([lonely])
    with pytest.raises(UnclipError, match=r"CLIP statistics .* is missing"):
        OriginalKarlo(lonely)
    (lonely / "b.ckpt").unlink()
    with pytest.raises(UnclipError, match=r"missing the decoder's \.ckpt"):
        detect([lonely])


class Bomb:
    """What a pickled checkpoint may do to whoever loads it."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.file),)


def test_a_pickle_bomb_is_refused(tmp_path: Path, folder: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    torch.save({"state_dict": {"model.prd_emb": torch.zeros(1)}, "x": Bomb(tmp_path / "gone")}, bad / "a.ckpt")
    with pytest.raises(UnclipError, match=r"a\.ckpt names .*, which is no tensor"):
        convert([bad], tmp_path / "out")
    assert not (tmp_path / "gone").exists() and not (tmp_path / "out").exists()
    (bad / "a.ckpt").write_bytes(b"nothing of the kind")
    with pytest.raises(UnclipError, match=r"a\.ckpt"):
        read_checkpoint(bad / "a.ckpt")


# ---- folders in diffusers' layout that are not whole ---------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in {**body, **changes}.items() if v is not ...}))

    return edit


def reshaped(folder: Path) -> None:
    file = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "conv_in.weight": torch.zeros(32, 3, 1, 1)}, file)


def numbered(folder: Path) -> None:
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "proj_in.bias": state["proj_in.bias"].long()}, file)


def pickled(folder: Path) -> None:
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def outside(folder: Path) -> None:
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    index = {"weight_map": {"proj_in.weight": "../../secret.safetensors"}}
    (folder / "prior" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = folder / "super_res_first" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_karlo(tmp_path_factory.mktemp("whole") / "karlo", 16)


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("text_proj"), r"incomplete as an unCLIP in diffusers' layout.*found .*decoder.*; missing text_proj"),
        (without("prior_scheduler"), r"found .*prior.*; missing prior_scheduler"),
        (edited("decoder/config.json", down_block_types=...), r"decoder cannot be read: 'down_block_types' is missing"),
        (edited("prior/config.json", num_layers="two"), r"the converted prior: depth: .*got 'two'"),
        (edited("prior/config.json", _class_name="Prior"), r"holds a 'Prior', expected a 'PriorTransformer'"),
        (edited("prior_scheduler/scheduler_config.json", _class_name="DDPMScheduler"), r"is a 'DDPMScheduler'"),
        (edited("prior_scheduler/scheduler_config.json", prediction_type="v"), r"prediction_type 'v'; expected one of"),
        (edited("decoder_scheduler/scheduler_config.json", variance_type="fixed_small_log"), r"6 output channels and"),
        (edited("text_encoder/config.json", hidden_act="relu"), r"hidden_act 'relu'; expected quick_gelu or gelu"),
        (edited("text_encoder/config.json", num_hidden_layers=3), r"missing transformer\.resblocks\.2"),
        (edited("tokenizer/vocab.json", zebra=3), r"no CLIP vocabulary of 400 merges: unknown tokens"),
        (reshaped, r"conv_in\.weight is \(32, 3, 1, 1\), expected \(32, 3, 3, 3\)"),
        (numbered, r"prior: image_in\.bias is of type int64; expected floats"),
        (pickled, r"is pickled, and nothing is unpickled here"),
        (outside, r"names '\.\./\.\./secret\.safetensors'; expected safetensors files beside it"),
        (cut, r"is damaged or not a safetensors file"),
    ],
)
def test_damaged_folders(whole: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "karlo")
    damage(folder)
    with pytest.raises(UnclipError, match=message):
        convert([folder], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["karlo"]  # nothing half-written


def test_folders_of_another_kind(whole: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UnclipError, match=r"no layout that is known here \(found: notes\.txt\); known: an unCLIP in"):
        detect([tmp_path])
    with pytest.raises(UnclipError, match="is a bundle already"):
        detect([tiny_bundle])
    with pytest.raises(UnclipError, match="no folder"):
        detect([tmp_path / "nowhere"])
