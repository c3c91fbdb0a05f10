"""A whole Karlo in diffusers' layout: imported, drawn with as diffusers 0.37.1 draws, and exported again."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_karlo import DIM, IMAGE, make_karlo, noise, projection_class
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip import UnCLIP
from unclip.diffusion import timesteps_from
from unclip.errors import UnclipError
from unclip.inputs import SampleOptions
from unclip.interop.detect import convert, detect
from unclip.interop.export import TEXT, VARIATIONS, export_diffusers
from unclip.interop.karlo import ConvertOptions, DiffusersKarlo, write_bundle

SIZE = 16
GOLDEN = Path(__file__).parent / "data" / "karlo_golden.safetensors"
# As in tests/reference/make_karlo_golden.py, which made GOLDEN with diffusers 0.37.1.
PROMPTS, SEEDS = ["a red apple on a table", "rainbow"], [11, 12]
STEPS: dict[str, Any] = {"prior_steps": 5, "decoder_steps": 5, "upsampler_steps": 4}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The text-to-image and the image-variations folder; shared, so do not change them."""
    root = tmp_path_factory.mktemp("karlo")
    return make_karlo(root / "text", SIZE), make_karlo(root / "variations", SIZE, variations=True)


@pytest.fixture(scope="module")
def bundle(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "karlo"
    assert convert(sources, out).name == "karlo-diffusers"
    return out


@pytest.fixture(scope="module")
def model(bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(bundle)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and float(expected.std()) > 0.1
    return float((found - expected).abs().max())


@pytest.fixture(scope="module")
def pictures(model: UnCLIP) -> dict[str, Tensor]:
    """What diffusers drew for the golden file, drawn by us."""
    picture = noise(5, 1, 3, IMAGE["image_size"], IMAGE["image_size"]).clamp(-1, 1)
    options = SampleOptions(prior_steps=STEPS["prior_steps"])
    return {
        "embedding": model.predict_embedding(PROMPTS, seed=SEEDS, options=options),
        "small": model.sample(PROMPTS, seed=SEEDS, size=SIZE, output="tensor", **STEPS),
        "image": model.sample(PROMPTS, seed=SEEDS, output="tensor", **STEPS),
        "varied": model.variations(picture, seed=SEEDS[0], output="tensor", **STEPS),
    }


# ---- fidelity ----------------------------------------------------------------------------------------------


def test_pictures_are_those_of_diffusers(
    model: UnCLIP, pictures: dict[str, Tensor], golden: dict[str, Tensor]
) -> None:
    """Every stage and both pipelines of 0.37.1, from the same noise, with its schedule in float64 as Karlo's was."""
    for name, found in pictures.items():
        assert largest(found, golden[name]) <= 1e-4, name
    small = model.upsamplers[0].sample(golden["small"], SEEDS, STEPS["upsampler_steps"])
    assert largest(small, golden["image"]) <= 1e-4


def test_what_float32_does_to_diffusers_pictures(
    model: UnCLIP, pictures: dict[str, Tensor], golden: dict[str, Tensor]
) -> None:
    """As 0.37.1 comes its schedule is float32, where 1 − ᾱ_0 keeps three digits: every stage ends with 0.99947 · x̂_0.
    Ours are its pictures up to that.
    """
    betas = torch.tensor(model.decoder.process.betas, dtype=torch.float32)
    factor = float(betas[0] / (1 - torch.cumprod(1 - betas, dim=0)[0]))
    assert abs(factor - 0.99947) < 1e-5
    assert all(largest(found, golden[f"float32.{name}"]) <= 3e-3 for name, found in pictures.items())
    # The last stage's share of it: what saturates is 1 in ours and that factor in theirs.
    full = pictures["image"] == 1
    assert int(full.sum()) > 100
    assert float((golden["float32.image"][full] - factor).abs().median()) <= 1e-6


def test_steps_and_guidance_are_karlos(model: UnCLIP, golden: dict[str, Tensor]) -> None:
    assert model.prior is not None
    for name, stage in (("prior", model.prior), ("decoder", model.decoder)):
        assert timesteps_from(stage.config.steps, 1000)[::-1] == golden[f"timesteps.{name}"].tolist()
    assert model.upsamplers[0].timesteps()[::-1] == [999, 832, 666, 500, 333, 166, 0]
    assert (model.prior.config.guidance, model.decoder.config.guidance) == (4.0, 8.0)
    assert model.prior.config.clip_range == 5.0  # the scheduler's own, not Karlo's 10


def test_captions_are_read_as_theirs(model: UnCLIP, golden: dict[str, Tensor]) -> None:
    ids, mask = model.clip.token_ids(PROMPTS)
    assert torch.equal(ids, golden["plain.ids"]) and torch.equal(mask, golden["plain.mask"])
    text = model.embed_text(PROMPTS)
    assert text.norm is not None
    assert largest(text.tokens, golden["plain.tokens"]) <= 1e-5
    assert largest(text.embedding * text.norm[:, None], golden["plain.embedding"]) <= 1e-5


def test_strange_captions(model: UnCLIP, golden: dict[str, Tensor]) -> None:
    """A "!" is the pad token there: Hugging Face's tokenizer makes it number 0. Ours reads the word it is. A caption of
    more than 77 tokens is cut by both after the same word, and ours says what was dropped.
    """
    ids, _ = model.clip.token_ids(["stop! go"])
    theirs = golden["exclamation.ids"]
    assert theirs[0, 4] == 0 and ids[0, 4] == 256  # "!" at the end of a word
    assert torch.equal(ids[:, :4], theirs[:, :4]) and torch.equal(ids[:, 5:], theirs[:, 5:])
    with pytest.warns(UserWarning, match="longer than CLIP's 77 tokens and was cut; dropped: '"):
        ids, mask = model.clip.token_ids(["one two three four five six seven eight nine ten " * 12])
    assert torch.equal(ids, golden["long.ids"]) and bool(mask.all())


# ---- import ------------------------------------------------------------------------------------------------


def test_either_folder_alone(sources: tuple[Path, Path], tmp_path: Path, model: UnCLIP) -> None:
    """Text alone has no image encoder, and says so; variations alone have no prior."""
    write_bundle(DiffusersKarlo(sources[:1]), tmp_path / "text")
    text = UnCLIP.from_pretrained(tmp_path / "text")
    quick = {"prior_steps": 2, "decoder_steps": 2, "size": SIZE, "output": "tensor"}
    assert torch.equal(text.sample("rainbow", **quick), model.sample("rainbow", **quick))  # type: ignore[call-overload]
    with pytest.raises(UnclipError, match=r"has no image encoder.*--clip"):
        text.variations(torch.zeros(1, 3, 32, 32), size=SIZE)
    write_bundle(DiffusersKarlo(sources[1:]), tmp_path / "varied")
    varied = UnCLIP.from_pretrained(tmp_path / "varied")
    assert varied.prior is None and varied.sizes == (SIZE, 4 * SIZE)
    one = {"decoder_steps": 2, "size": SIZE, "output": "tensor"}
    picture = noise(1, 3, 32, 32).clamp(-1, 1)
    assert torch.equal(varied.variations(picture, **one), model.variations(picture, **one))  # type: ignore[call-overload]


def test_clip_through_open_clip_gives_the_same(
    sources: tuple[Path, Path], bundle: Path, tmp_path: Path, model: UnCLIP
) -> None:
    write_bundle(DiffusersKarlo(sources[:1]), tmp_path / "out", ConvertOptions(clip=str(bundle)))
    other = UnCLIP.from_pretrained(tmp_path / "out")
    assert other.clip.sees
    assert largest(other.embed_text(PROMPTS).tokens, model.embed_text(PROMPTS).tokens) <= 1e-5


def test_one_part_after_the_other_is_in_memory(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """When a part is read, no tensor of the one before is left; and what is read is the files' own memory."""
    read: list[weakref.ref[Tensor]] = []
    left: list[int] = []

    class Watched(DiffusersKarlo):
        def part(self, name: str, null: Any, *, weights: bool) -> Any:
            if weights:
                left.append(sum(one() is not None for one in read))
                read.clear()
            config, state = super().part(name, null, weights=weights)
            if weights:
                read.extend(weakref.ref(tensor) for tensor in state.values())
            return config, state

    write_bundle(Watched(sources), tmp_path / "out")
    assert left == [0, 0, 0] and len(read) > 100


def test_half_precision_is_kept_and_made(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sources[0], tmp_path / "half")
    file = folder / "prior" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    write_bundle(DiffusersKarlo([folder]), tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "prior" / "model.safetensors")
    assert kept["out.weight"].dtype == torch.float16 and kept["clip_null_tokens"].dtype == torch.float32
    write_bundle(DiffusersKarlo([folder]), tmp_path / "made", ConvertOptions(dtype=torch.float16))
    made = load_file(tmp_path / "made" / "decoder" / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.float16, torch.bool}


def test_a_larger_stage_is_added(sources: tuple[Path, Path], tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match=r"an upsampler takes 256 px, the stage before it makes 64 px"):
        options = ConvertOptions(upsampler_1024=tiny_parts["upsampler_1024"])
        write_bundle(DiffusersKarlo(sources[:1]), tmp_path / "out", options)
    assert not any(tmp_path.iterdir())  # nothing half-written


def test_a_larger_stage_is_drawn_with(
    tiny_parts: dict[str, Path], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """Karlo's 64 and 256 px, and a stage that was trained here behind them."""
    source, out = make_karlo(tmp_path / "karlo", 64), tmp_path / "bundle"
    code, printed, err = run_cli("convert", source, "--out", out, "--upsampler-1024", tiny_parts["upsampler_1024"])
    assert (code, printed.strip()) == (0, str(out)), err
    part = load_file(out / "upsampler_1024" / "model.safetensors")
    own = load_file(tiny_parts["upsampler_1024"] / "model.safetensors")
    assert all(torch.equal(part[name], own[name]) for name in own) and len(part) == len(own)
    model = UnCLIP.from_pretrained(out, device="cpu")
    assert model.sizes == (64, 256, 1024)
    steps = {"prior_steps": 2, "decoder_steps": 2, "upsampler_steps": 2}
    (drawn,) = model.sample("a red apple", seed=1, output="tensor", **steps)
    (middle,) = model.sample("a red apple", seed=1, size=256, output="tensor", **steps)
    wanted = model.upsamplers[1].sample(middle[None], [1], 2)[0]
    assert drawn.shape == (3, 1024, 1024) and torch.equal(drawn, wanted)


# ---- export ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("pipeline", [TEXT, VARIATIONS])
def test_there_and_back_changes_no_bit(
    sources: tuple[Path, Path], bundle: Path, tmp_path: Path, pipeline: str
) -> None:
    source = sources[pipeline == VARIATIONS]
    assert export_diffusers(bundle, tmp_path / "out", pipeline=pipeline) == []
    index, before = (json.loads((root / "model_index.json").read_text()) for root in (tmp_path / "out", source))
    assert {name: tuple(kind) for name, kind in index.items() if name[0] != "_"} == {
        name: tuple(kind) for name, kind in before.items() if name[0] != "_"
    }
    assert index["_class_name"] == pipeline and index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]
    for file in sorted(source.rglob("*.safetensors")):
        there, back = load_file(file), load_file(tmp_path / "out" / file.relative_to(source))
        assert set(there) == set(back)
        assert all(torch.equal(back[name], tensor) for name, tensor in there.items()), file
    convert([source], tmp_path / "once")
    convert([tmp_path / "out"], tmp_path / "twice")
    once, twice = contents(tmp_path / "once"), contents(tmp_path / "twice")
    once.pop("unclip.json"), twice.pop("unclip.json")  # which tell the folder's name
    assert once == twice


def test_single_networks_load_in_the_newest_diffusers(bundle: Path, tmp_path: Path) -> None:
    from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    export_diffusers(bundle, tmp_path / "out", parts=["prior", "decoder", "upsampler_256", "clip"])
    assert not (tmp_path / "out" / "model_index.json").exists()
    loaders: dict[str, Any] = {
        "prior": PriorTransformer,
        "decoder": UNet2DConditionModel,
        "text_proj": projection_class(),
        "super_res_first": UNet2DModel,
        "super_res_last": UNet2DModel,
        "text_encoder": CLIPTextModelWithProjection,
        "image_encoder": CLIPVisionModelWithProjection,
    }
    for name, loader in loaders.items():
        network, report = loader.from_pretrained(tmp_path / "out" / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], name
        assert sum(one.numel() for one in network.parameters()) > 1000
    scheduler = UnCLIPScheduler.from_pretrained(tmp_path / "out" / "decoder_scheduler")
    assert scheduler.config.variance_type == "learned_range"
    assert CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")("rainbow").input_ids[-1] == 913


def test_a_bundle_of_another_shape_names_the_field(tiny_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match=r"^decoder: .*no such decoder: embedding_length is 'unit'"):
        export_diffusers(tiny_bundle, tmp_path / "out")
    with pytest.raises(UnclipError, match=r"^prior: .*attention_bias is False"):
        export_diffusers(tiny_bundle, tmp_path / "out", parts=["prior"])
    changed = shutil.copytree(bundle, tmp_path / "changed")
    for part, section, message in (
        ("decoder", {"schedule": "linear"}, r"decoder: diffusion.schedule is 'linear'; .* has cosine"),
        ("prior", {"prediction": "v"}, r"prior: diffusion.prediction is 'v'; .* has epsilon or x_start"),
    ):
        file = changed / part / "config.json"
        before = file.read_text()
        body = json.loads(before)
        body["config"]["diffusion"].update(section)
        file.write_text(json.dumps(body))
        with pytest.raises(UnclipError, match=message):
            export_diffusers(changed, tmp_path / "out")
        file.write_text(before)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UnclipError, match="holds something else"):
        export_diffusers(bundle, tmp_path / "mine", overwrite=True)


# ---- the command -------------------------------------------------------------------------------------------


def test_convert_sample_and_export_by_command(
    sources: tuple[Path, Path], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "karlo"
    code, printed, _ = run_cli("convert", *sources, "--out", out)
    assert code == 0 and printed.strip() == str(out)
    code, _, said = run_cli("convert", sources[0], "--out", out)
    assert code == 1 and "pass --overwrite" in said
    code, printed, _ = run_cli("export", out, "--to", "diffusers-variations", "--out", tmp_path / "there")
    assert code == 0 and detect([tmp_path / "there"]).name == "karlo-diffusers"
    code, _, said = run_cli("export", out, "--to", "onnx", "--out", tmp_path / "no")
    assert code == 2


def test_a_folder_is_drawn_with_directly(
    sources: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    """Converted once, then taken from the cache until a file of the source changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ["sample", "--model", sources[0], "--prompt", "rainbow", "--size", SIZE, "--prior-steps", 1]
    code, _, said = run_cli(*asked, "--decoder-steps", 1, "--out", tmp_path / "a.png")
    assert code == 0 and "converting" in said
    code, _, said = run_cli(*asked, "--decoder-steps", 1, "--out", tmp_path / "b.png")
    assert code == 0 and "converting" not in said
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(list((tmp_path / "cache" / "unclip" / "converted").iterdir())) == 1


def test_all_is_drawn_at_64_and_256(tmp_path: Path) -> None:
    """Text, variations, interpolation, decoding and inversion on a Karlo of the published sizes."""
    make_karlo(tmp_path / "text"), make_karlo(tmp_path / "varied", variations=True)
    convert([tmp_path / "text", tmp_path / "varied"], tmp_path / "out")
    model = UnCLIP.from_pretrained(tmp_path / "out")
    assert model.sizes == (64, 256)
    one: dict[str, Any] = {"decoder_steps": 1, "upsampler_steps": [999], "output": "tensor"}
    assert model.sample("rainbow", prior_steps=1, **one).shape == (1, 3, 256, 256)
    picture = noise(1, 3, 64, 64).clamp(-1, 1)
    small = {**one, "size": 64}
    assert model.variations(picture, **small).shape == (1, 3, 64, 64)
    assert model.decode(noise(2, DIM), **small).shape == (1, 3, 64, 64)
    other = noise(3, 3, 64, 64).clamp(-1, 1)
    between = model.interpolate([picture, other], frames=2, steps=2, refinements=0, size=64, output="tensor")
    assert between.shape == (2, 3, 64, 64)  # type: ignore[union-attr]
    back = model.reconstruct(picture, steps=2, size=64, output="tensor")
    assert back.shape == (1, 3, 64, 64) and bool(torch.isfinite(back).all())  # type: ignore[union-attr, arg-type]
