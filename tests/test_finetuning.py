"""Runs that start from trained weights, and what of a network learns: shapes, patterns, nulls, inpainting."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import helpers_decoder
import helpers_prior
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from decoder import Decoder, DecoderConfig, DecoderRunConfig, decoder_loss
from decoder.start import begin_from, start_from, with_start
from prior import AutoregressivePriorConfig, Prior, PriorConfig, PriorRunConfig, build_network
from prior.start import begin_from as begin_prior
from prior.start import read_part
from prior.start import with_start as with_prior_start
from unclip.bundle import save_part
from unclip.clip import FrozenCLIP
from unclip.config import TrainConfig, parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError
from unclip.training.clip_config import ClipRunConfig
from unclip.training.finetune import Tuning, choose_trainable
from unclip.training.start import Start, open_start
from upsamplers import UpsamplerRunConfig
from upsamplers.start import with_start as with_upsampler_start

ROOT = Path(__file__).parents[1]
LEARNED_RANGE = {"prediction": "epsilon", "variance": "learned_range"}


def decoder_run(**body: Any) -> DecoderRunConfig:
    return parse_config(DecoderRunConfig, {"clip": "none", **body})


def saved(folder: Path, network: Decoder | Prior) -> Path:
    save_part(folder, "decoder" if isinstance(network, Decoder) else "prior", network.config, network.state_dict())
    return folder


def start_prior(network: Prior, folder: Path) -> str | None:
    return begin_prior(network, Start(folder, *read_part(folder)))


# ---- where weights come from ---------------------------------------------------------------------------------


def test_a_bundle_a_part_and_a_run_are_found(tiny_bundle: Path, tmp_path: Path) -> None:
    part = tiny_bundle / "decoder"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UnclipError, match="is a run that has not written its model yet"):
        with_start(decoder_run(init_from=str(run)))
    (run / "model").symlink_to(part)
    for place in (tiny_bundle, part, run):
        config, start = with_start(decoder_run(init_from=str(place)))
        assert start is not None and start.config == config.model
        network = Decoder(config.model)
        assert begin_from(network, start) is None
        assert all(torch.equal(value, start.state[name]) for name, value in network.state_dict().items())


def test_the_bundled_model_has_a_name_and_a_clip() -> None:
    config, start = with_prior_start(parse_config(PriorRunConfig, {"clip": "emoji", "init_from": "emoji"}))
    assert start is not None and config.model.width == 256 and config.model.depth == 4
    assert FrozenCLIP.load("emoji").embedding_dim == config.model.embedding_dim


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "init_from names 'nowhere/at/all', and there is no such folder; name a bundle, a run"),
        ("prior", "holds a 'prior', expected a 'decoder'"),
        ("empty", r"is not a model part: config.json is missing \(found: nothing\)"),
        ("half", "which has no decoder; it has clip, prior"),
        ("foreign", "is a checkpoint of diffusers; it can be read by the train_.*py scripts alone"),
    ],
)
def test_folders_that_hold_no_decoder(name: str, message: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "prior").symlink_to(tiny_bundle / "prior")
    half = tmp_path / "half"
    half.mkdir()
    for inside in ("clip", "prior"):
        shutil.copytree(tiny_bundle / inside, half / inside)
        (half / f"real_{inside}").mkdir()
    parts = {"clip": "real_clip", "prior": "real_prior"}
    (half / "unclip.json").write_text(json.dumps({"format": 1, "parts": parts}))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model_index.json").write_text("{}")
    place = name if name.startswith("nowhere") else str(tmp_path / name)
    with pytest.raises(UnclipError, match=message):
        with_start(decoder_run(init_from=place))


def test_of_a_bundle_the_upsampler_of_the_runs_size_is_taken(tiny_bundle: Path) -> None:
    for edge in (256, 1024):
        body = {"init_from": str(tiny_bundle), "data": {"image_size": edge}, "crop_fraction": 0.25}
        config, start = with_upsampler_start(parse_config(UpsamplerRunConfig, body))
        assert start is not None and start.folder.name == f"upsampler_{edge}"
        assert config.model.high_size == edge and config.model.low_size == edge // 4
        assert config.data.crop_size == edge // 4
    with pytest.raises(UnclipError, match=r"none of the upsamplers in .* has the sizes of this run"):
        with_upsampler_start(parse_config(UpsamplerRunConfig, {**body, "data": {"image_size": 128}}))


# ---- the architecture ----------------------------------------------------------------------------------------


def test_what_the_section_model_leaves_out_is_as_in_the_checkpoint(tmp_path: Path) -> None:
    source = helpers_decoder.network(spatial_seed=True, drop_text=0.3, diffusion={"prediction": "v"})
    place = str(saved(tmp_path / "part", source))
    config, _ = with_start(decoder_run(init_from=place))
    assert config.model == source.config
    changed, _ = with_start(decoder_run(init_from=place, model={"drop_text": 0.5, "unet": {"dropout": 0.1}}))
    expected = {**source.config.model_dump(), "drop_text": 0.5}
    expected["unet"]["dropout"] = 0.1
    assert changed.model.model_dump() == expected
    # A section of another kind is taken whole.
    other, _ = with_start(decoder_run(init_from=place, model={"text": {"kind": "glide", "length": 9}}))
    assert other.model.text.kind == "glide" and other.model.text.width == 512 and other.model.spatial_seed
    # What a run recorded says everything, and nothing is inherited any more.
    whole, _ = with_start(decoder_run(init_from=place, model=DecoderConfig().model_dump()))
    assert whole.model == DecoderConfig()


def test_a_plan_takes_the_checkpoints_sizes() -> None:
    from unclip.planning.recipe import read_recipe

    source = json.loads((ROOT / "unclip/models/emoji/decoder/config.json").read_text())["config"]
    planned = read_recipe(ROOT / "configs/decoder/emoji_lora.yaml").config.model
    assert planned == parse_config(DecoderConfig, source)
    told = read_recipe(ROOT / "configs/decoder/paper_inpaint_64.yaml").assumptions
    assert any("is not here: what the section model leaves out has its default" in text for text in told)


def test_without_a_model_and_without_a_start_there_is_no_run() -> None:
    for cls in (DecoderRunConfig, PriorRunConfig):
        with pytest.raises(UsageError, match="no section model; describe the network, or take that of another"):
            parse_config(cls, {"clip": "none"})
    with pytest.raises(UsageError, match=r"train\.lora is for priors, decoders and upsamplers"):
        parse_config(ClipRunConfig, {"train": {"lora": {}}})
    with pytest.raises(UsageError, match=r"image_size is 128, expected model.high_size 256"):
        parse_config(UpsamplerRunConfig, {"data": {"image_size": 128}})


def test_the_first_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path) -> None:
    saved(tmp_path / "part", helpers_decoder.network())
    wider = Decoder(helpers_decoder.config(context_dim=24))
    with pytest.raises(UnclipError) as caught:
        start_from(wider, tmp_path / "part")
    message = str(caught.value)
    assert "do not fit this decoder" in message and "leave its sizes out" in message
    assert "embedding_to_tokens.weight is (64, 12) there and (96, 12) here" in message
    assert message.count(" there and ") == 3 and "more" in message
    deeper = Prior(helpers_prior.config(depth=3))
    saved(tmp_path / "prior", helpers_prior.network())
    with pytest.raises(UnclipError, match=r"transformer\.layers\.4\..* is missing there"):
        start_prior(deeper, tmp_path / "prior")


def test_a_prior_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    place = str(saved(tmp_path / "prior", helpers_prior.network()))
    body = {"clip": "none", "init_from": place, "model": {"kind": "autoregressive"}}
    with pytest.raises(UnclipError, match=r"a prior of kind diffusion, and model\.kind is autoregressive"):
        with_prior_start(parse_config(PriorRunConfig, body))
    # How many components there are is the checkpoint's, where nothing is said.
    shape = {key: value for key, value in helpers_prior.SMALL.items() if key != "steps"}
    settled = parse_config(AutoregressivePriorConfig, {**shape, "components": 5, "buckets": 4, "dot_buckets": 3})
    save_part(tmp_path / "codes", "prior", settled, build_network(settled).state_dict())
    body = {"clip": "none", "init_from": str(tmp_path / "codes"), "model": {"kind": "autoregressive", "top_p": 0.9}}
    config, _ = with_prior_start(parse_config(PriorRunConfig, body))
    assert isinstance(config.model, AutoregressivePriorConfig)
    assert config.model.components == 5 and config.model.top_p == 0.9


def test_a_prior_keeps_the_space_that_its_weights_know(tmp_path: Path) -> None:
    source = helpers_prior.network()
    with torch.no_grad():
        source.mean.fill_(0.25)
        source.std.fill_(0.5)
    saved(tmp_path / "prior", source)
    fresh = helpers_prior.network()
    assert start_prior(fresh, tmp_path / "prior") is None
    assert torch.equal(fresh.mean, source.mean) and torch.equal(fresh.std, source.std)
    scaled = Prior(helpers_prior.config(normalisation="scale", diffusion={"prediction": "epsilon"}))
    note = start_prior(scaled, tmp_path / "prior")
    assert note is not None and "the output layer starts anew, as it predicted x_start" in note
    assert "another space" in note and float(scaled.mean.abs().max()) == 0


# ---- what stands for a dropped caption -----------------------------------------------------------------------


def drop(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**condition, "drop_text": torch.ones_like(condition["drop_text"])}


def decoder_inputs(scale: float | None = None) -> dict[str, Tensor]:
    features, no = helpers_decoder.text(2), torch.zeros(2, dtype=torch.bool)
    size = helpers_decoder.SIZE
    inputs = {"x_t": helpers_decoder.rand(2, 3, size, size, seed=3), "t": torch.tensor([50, 700])}
    inputs |= {"image_embedding": helpers_decoder.unit(2, 7), "text_tokens": features.tokens}
    inputs |= {"text_mask": features.mask, "drop_embedding": no, "drop_text": no}
    return inputs if scale is None else {**inputs, "text_embedding": features.embedding}


def test_learned_nulls_begin_as_the_clips_features(tmp_path: Path) -> None:
    """With every token of '' real, the decoder's answer without a caption is what it was."""
    source = helpers_decoder.network(null_text="clip", text_embedding_to_time=True)
    source.null_mask.fill_(True)  # type: ignore[operator]
    saved(tmp_path / "part", source)
    fresh = Decoder(helpers_decoder.config(text_embedding_to_time=True)).eval()
    note = start_from(fresh, tmp_path / "part")
    assert note is not None and note.count("\n") == 0 and "null_mask left behind" in note
    assert isinstance(fresh.null_text, nn.Parameter) and fresh.null_text.requires_grad
    for condition in (decoder_inputs(1.0), drop(decoder_inputs(1.0))):
        assert torch.allclose(fresh(**condition), source(**condition), atol=1e-6)


def test_learned_nulls_give_way_to_the_clips_features(tmp_path: Path) -> None:
    source = helpers_decoder.network(text_embedding_to_time=True)
    saved(tmp_path / "part", source)
    fresh = Decoder(helpers_decoder.config(null_text="clip", text_embedding_to_time=True)).eval()
    fresh.set_null_text(helpers_decoder.text(1, seed=90))
    kept = fresh.null_text.clone()
    note = start_from(fresh, tmp_path / "part")
    assert note is not None and "null_text, null_text_embedding (learned for dropped captions) left behind" in note
    assert torch.equal(fresh.null_text, kept) and bool(fresh.null_mask.any())  # type: ignore[operator, arg-type]
    assert torch.equal(fresh(**decoder_inputs(1.0)), source(**decoder_inputs(1.0)))


def test_nulls_of_a_prior_in_both_directions(tmp_path: Path) -> None:
    source = helpers_prior.network(null_text="clip")
    source.store_null(helpers_prior.text(1, seed=9), "unit")
    source.clip_null_mask.fill_(True)
    saved(tmp_path / "clip", source)
    learned = helpers_prior.network()
    note = start_prior(learned, tmp_path / "clip")
    assert note is not None and "clip_null_mask left behind" in note
    given = helpers_prior.inputs()
    for condition in (given, drop(given)):
        assert torch.allclose(learned(**condition), source(**condition), atol=1e-5)
    saved(tmp_path / "learned", learned)
    back = Prior(source.config).eval()
    note = start_prior(back, tmp_path / "learned")
    assert note is not None and "null_tokens, null_text (learned for dropped captions) left behind" in note
    assert torch.equal(back(**given), learned(**given))


# ---- inpainting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_first_answer_of_an_inpainting_decoder_is_the_plain_ones(tmp_path: Path, patch_size: int) -> None:
    """Exactly: the weights of the four new channels are zero (GLIDE, §3.3)."""
    unet = {**helpers_decoder.SMALL["unet"], "patch_size": patch_size, "attention_resolutions": [8 // patch_size]}
    source = helpers_decoder.network(unet=unet, diffusion=LEARNED_RANGE)
    place = saved(tmp_path / "part", source)
    config, start = with_start(decoder_run(init_from=str(place), model={"inpainting": True, "drop_both": 0.2}))
    assert start is not None and config.model.inpainting and config.model.unet == source.config.unet
    fresh = Decoder(config.model).eval()
    begin_from(fresh, start)
    size = helpers_decoder.SIZE
    image, known = helpers_decoder.rand(2, 3, size, size, seed=8), torch.zeros(2, 1, size, size)
    known[:, :, :, 3:] = 1
    answer = fresh(**decoder_inputs(), known_image=image, known=known)
    assert torch.equal(answer, source(**decoder_inputs()))


def test_both_conditions_are_dropped_together_as_often_as_asked() -> None:
    """GLIDE drops its only condition from 20 % of the samples; here both go, beside 10 % and 50 % of their own."""
    own = helpers_decoder.config(drop_embedding=0.1, drop_text=0.5, drop_both=0.2)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        seen.append((condition["drop_embedding"], condition["drop_text"]))
        return torch.cat([x_t, x_t], dim=1) if own.diffusion.variance == "learned_range" else x_t

    count = 8_000
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, 3, 1, 1).expand(count, -1, 8, 8)
    features = helpers_decoder.text(1)[torch.zeros(count, dtype=torch.long)]
    decoder_loss(
        network, GaussianDiffusion(own.diffusion), own, picture, torch.ones(count, 12) / 12**0.5, features, generator
    )
    embedding, caption = seen[0]
    assert float((embedding & caption).float().mean()) == pytest.approx(0.2 + 0.8 * 0.05, abs=0.02)
    assert float(embedding.float().mean()) == pytest.approx(0.2 + 0.8 * 0.1, abs=0.02)
    assert float(caption.float().mean()) == pytest.approx(0.2 + 0.8 * 0.5, abs=0.02)


# ---- what learns ---------------------------------------------------------------------------------------------


def learning(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_patterns_choose_what_learns() -> None:
    every = learning(Decoder(helpers_decoder.config()))
    network = Decoder(helpers_decoder.config())
    choose_trainable(network, freeze=["unet.down.*", "*.attention", "null_?ext"])
    out = {n for n in every if n.startswith("unet.down.") or ".attention." in n or n == "null_text"}
    assert out and learning(network) == every - out
    network = Decoder(helpers_decoder.config())
    choose_trainable(network, trainable=["unet.middle", "*.bias"])
    assert learning(network) == {n for n in every if n.startswith("unet.middle.") or n.endswith(".bias")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["unet.dwon.*"]}, r"train.freeze 'unet.dwon.\*' matches no parameter .*; nearest: unet.down"),
        ({"trainable": ["zzzz"]}, r"trainable 'zzzz' matches no parameter .*; there are null_embedding, .* in all"),
        ({"freeze": ["*"]}, "nothing is left to learn"),
        ({"lora": {"target": ["conv", "feedforward"]}}, "'feedforward' finds no layer in this network; it has"),
        ({"lora": {"target": ["unet.midle.*"]}}, "matches no linear layer or convolution .*; nearest: unet.middle"),
    ],
)
def test_patterns_that_say_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    network = Decoder(helpers_decoder.config())
    train = parse_config(TrainConfig, {"run_dir": str(tmp_path), **options})
    with pytest.raises(UsageError, match=message):
        Tuning(network, train, "decoder", network.config)


def test_one_way_to_choose_what_learns() -> None:
    with pytest.raises(UsageError, match=r"freeze and lora are given; .* so name one of them"):
        parse_config(TrainConfig, {"freeze": ["a"], "lora": {}})


def test_a_run_goes_on_with_what_it_trained(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    recorded = parse_config(TrainConfig, {"lora": {"rank": 4, "export": "merged"}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": recorded.model_dump(mode="json")}))

    def go_on(**options: Any) -> Tuning:
        network = Decoder(helpers_decoder.config())
        train = parse_config(TrainConfig, {"run_dir": str(tmp_path), **options})
        return Tuning(network, train, "decoder", network.config)

    assert go_on(lora={"rank": 4, "export": "adapter"}).writes_model is False  # what is written may change
    for options in ({}, {"lora": {"rank": 8}}):
        with pytest.raises(UnclipError, match=r"holds a run with another train\.lora .*; choose another train.run_dir"):
            go_on(**options)


# ---- other people's checkpoints ------------------------------------------------------------------------------


def test_karlos_prior_as_diffusers_writes_it(tmp_path: Path) -> None:
    from diffusers import PriorTransformer

    from unclip.interop.folders import read_prior
    from unclip.interop.prior import prior_from_diffusers

    torch.manual_seed(0)
    theirs = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=6
    )
    theirs.save_pretrained(tmp_path / "pipeline" / "prior")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "prior"):
        body = {"clip": "none", "init_from": str(place)}
        config, start = with_prior_start(parse_config(PriorRunConfig, body), read_prior)
        assert start is not None and isinstance(config.model, PriorConfig)
        assert config.model.null_text == "clip" and config.model.depth == 2 and config.model.embedding_length == "raw"
        network = Prior(config.model)
        begin_prior(network, start)
        _, expected = prior_from_diffusers(theirs.state_dict(), dict(theirs.config))
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    (file,) = (tmp_path / "pipeline" / "prior").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    start = open_start(str(tmp_path / "pipeline"), "prior", lambda _: (None, {}), foreign=read_prior)
    assert all(torch.equal(value, start.state[name]) for name, value in expected.items())
    file.with_suffix(".bin").write_bytes(pickle.dumps(print))
    with pytest.raises(UnclipError, match=r"diffusion_pytorch_model\.bin"):
        open_start(str(tmp_path / "pipeline"), "prior", lambda _: (None, {}), foreign=read_prior)


def test_karlos_decoder_and_super_resolution_as_diffusers_lays_them_out(tmp_path: Path) -> None:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from test_interop_unet import DIM, SHAPE, conditional, super_resolution

    from unclip.interop.folders import read_decoder, read_upsampler

    width = SHAPE["block_out_channels"][0]
    projection = UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=4 * width, cross_attention_dim=24)
    for name, model in (
        ("decoder", conditional()), ("text_proj", projection), ("super_res_first", super_resolution(1)),
        ("super_res_last", super_resolution(2)),
    ):  # fmt: skip
        model.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    config, start = with_start(decoder_run(init_from=str(tmp_path)), read_decoder)
    assert start is not None and config.model.null_text == "clip"
    begin_from(Decoder(config.model), start)
    body = {"init_from": str(tmp_path), "data": {"image_size": 16}}
    upsampler, taken = with_upsampler_start(parse_config(UpsamplerRunConfig, body), read_upsampler)
    assert taken is not None and upsampler.model.last_step_network and upsampler.model.low_size == 4
    with pytest.raises(UnclipError, match=r"holds a 'UNet2DModel', expected a 'PriorTransformer'"):
        from unclip.interop.folders import read_prior

        with_prior_start(
            parse_config(PriorRunConfig, {"clip": "none", "init_from": str(tmp_path / "super_res_first")}), read_prior
        )
