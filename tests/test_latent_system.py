"""A system in latents from end to end: upsamplers, bundles that carry their autoencoders, inversion and editing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_latent import FIXED, UNET, latent_decoder, latent_of, latent_upsampler, make_autoencoders
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unclip.adapters import adapter_state, add_adapter, save_adapter
from unclip.assemble import assemble, merge
from unclip.autoencoder import CARRIED, FrozenAutoencoder
from unclip.bundle import read_part_json, save_part
from unclip.clip import FrozenCLIP
from unclip.config import LoRAConfig, parse_config
from unclip.errors import UnclipError, UsageError
from unclip.latents import Latents
from unclip.pipeline import UnCLIP
from unclip.planning.recipe import read_recipe
from unclip.planning.trace import planning_tensors, trace_step
from unclip.planning.workload import open_workload
from unclip.publishing import bundle_files
from unclip.training import current
from upsamplers import UpsamplerConfig, UpsamplerRunConfig, UpsamplerStage
from upsamplers.objective import make_condition, pair
from upsamplers.start import with_start
from upsamplers.train import run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_autoencoders(tmp_path_factory.mktemp("autoencoders"))


@pytest.fixture(scope="module")
def system(autoencoders: dict[str, str], tiny_clip_folder: Path) -> UnCLIP:
    """16 px by a decoder, 32 px by an upsampler, both in latents."""
    upsampler = latent_upsampler(autoencoders["kl"], 16, 32)
    clip = FrozenCLIP.load(str(tiny_clip_folder))
    return UnCLIP(clip, latent_decoder(autoencoders["kl"]), upsamplers=[upsampler], manifest={"name": "latent"})


@pytest.fixture(scope="module")
def calm(system: UnCLIP, autoencoders: dict[str, str]) -> UnCLIP:
    """The same with a decoder that predicts a smooth x_0, as inversion asks for."""
    decoder = latent_decoder(autoencoders["kl"], shake=0.02, diffusion={**FIXED, "prediction": "x_start"})
    return UnCLIP(system.clip, decoder, upsamplers=system.upsamplers, manifest={"name": "calm"})


def pictures(count: int, height: int, width: int | None = None) -> Tensor:
    """Smooth ones, in [-1, 1]."""
    generator = torch.Generator().manual_seed(count + height)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, (height, width or height), mode="bilinear")


# ---- upsamplers ----------------------------------------------------------------------------------------


def test_an_untrained_residual_upsampler_enlarges_latents(autoencoders: dict[str, str]) -> None:
    """Its x_0 is the enlarged condition, so that the picture is known: decode(enlarge(encode(low)))."""
    own = {"diffusion": {**FIXED, "prediction": "x_start"}, "residual": True, "condition": "latent"}
    stage = latent_upsampler(autoencoders["kl"], 16, 32, shake=0, **own)
    low = pictures(2, 16)
    frozen = stage.autoencoder
    assert frozen is not None and stage.network.in_channels == 8
    wanted = frozen.decode(F.interpolate(frozen.encode(low), (16, 16), mode="bicubic", antialias=True))
    torch.testing.assert_close(stage.sample(low, [0, 1]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "condition", "channels"), [("kl", "image", 3), ("deep", "image", 12), ("deep", "latent", 4)]
)
def test_pictures_of_any_size_come_out_enlarged(
    autoencoders: dict[str, str], kind: str, condition: str, channels: int
) -> None:
    """Whatever the latents divide by; pixels finer than latents are folded, so that none is lost."""
    stage = latent_upsampler(autoencoders[kind], 16, 32, condition=condition)
    assert stage.config.condition_channels == channels
    for height, width in ((16, 16), (7, 13), (1, 3)):
        low = pictures(2, height, width)
        drawn = stage.sample(low, [3, 4])
        assert drawn.shape == (2, 3, 2 * height, 2 * width) and drawn.abs().max() <= 1
        alone = stage.sample(low[1:], [4])
        torch.testing.assert_close(alone[0], drawn[1], atol=1e-4, rtol=0)
    other = stage.sample(-low, [3, 4])
    assert (other - drawn).abs().max() > 1e-3  # the condition reaches the result


def test_what_is_folded_is_all_there(autoencoders: dict[str, str]) -> None:
    """A change of one pixel of the condition changes the output, wherever it is in its latent's square."""
    network = latent_upsampler(autoencoders["deep"], 16, 32).network
    x_t, t, low = torch.randn(1, 4, 8, 8), torch.tensor([500]), pictures(1, 16)
    before = network(x_t, t, low)
    for y, x in ((4, 4), (4, 5), (5, 4), (5, 5)):
        changed = low.clone()
        changed[0, 0, y, x] += 1
        assert (network(x_t, t, changed) - before).abs().max() > 1e-4


def test_the_training_pair_is_encoded(autoencoders: dict[str, str]) -> None:
    frozen, truth = FrozenAutoencoder.load(autoencoders["kl"]), pictures(2, 32)
    for condition in ("image", "latent"):
        config = latent_upsampler(autoencoders["kl"], 16, 32, condition=condition).config
        x_start, seen = pair(truth, config, torch.Generator().manual_seed(1), frozen)
        low = make_condition(truth, config, torch.Generator().manual_seed(1))
        torch.testing.assert_close(x_start, frozen.encode(truth))
        torch.testing.assert_close(seen, low if condition == "image" else frozen.encode(low))


def recipe(name: str, folder: Path, crop: int = 8, **model: Any) -> UpsamplerRunConfig:
    own = {"low_size": 8, "high_size": 16, "steps": 2, "noise_augmentation": 100, "corruption": {"kind": "bsr"}}
    train = {"run_dir": str(folder), "steps": 3, "batch_size": 2, "log_every": 1, "sample_every": 3}
    body = {
        "model": {**own, "latent": {"name": name}, "diffusion": FIXED, "unet": UNET, **model},
        "data": {"source": "synthetic", "image_size": 16, "crop_size": crop, "synthetic": {"size": 8}},
        "train": {**train, "wandb": {"mode": "disabled"}},
    }
    return parse_config(UpsamplerRunConfig, body)


@pytest.mark.parametrize("condition", ["image", "latent"])
def test_the_same_training_makes_an_upsampler_in_latents(
    autoencoders: dict[str, str], tmp_path: Path, condition: str
) -> None:
    part = run(recipe(autoencoders["kl"], tmp_path / "run", condition=condition), current())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    assert list((tmp_path / "run").rglob("*.png"))
    stage = UpsamplerStage.load(part)
    latent = stage.config.latent
    assert latent is not None and (latent.channels, latent.factor, latent.scale, latent.shift) == (4, 2, 0.5, 0.25)
    assert stage.sample(pictures(1, 9, 11), [0]).shape == (1, 3, 18, 22)
    again = parse_config(UpsamplerRunConfig, {"init_from": str(part), "data": {"image_size": 16}})
    started, _ = with_start(again)
    assert started.model.latent == latent and started.model.condition == condition


def test_what_an_upsampler_in_latents_cannot_be(autoencoders: dict[str, str], tmp_path: Path) -> None:
    def refused(match: str, **model: Any) -> None:
        with pytest.raises(UsageError, match=match):
            parse_config(UpsamplerConfig, {"low_size": 16, "high_size": 32, "diffusion": FIXED, **model})

    deep = latent_of(autoencoders["deep"])
    refused("likelihood of pixels", latent=deep, diffusion={"variance": "learned_range"})
    refused("needs an upsampler in latents", condition="latent")
    refused("set model.condition to latent", latent=deep, residual=True, diffusion={**FIXED, "prediction": "x_start"})
    refused("no whole number of latents", latent={**deep, "factor": 5})
    refused("no whole number of latents", latent=deep, low_size=9, high_size=18, condition="latent")
    with pytest.raises(UsageError, match="crop_size 10 is no whole number of latents; take a multiple of 4"):
        run(recipe(autoencoders["kl"], tmp_path / "run", crop=10, condition="latent"), current())
    with pytest.raises(UsageError, match="a memory limit is kept by upsamplers in pixels"):
        latent_upsampler(autoencoders["kl"], 16, 32).sample(pictures(1, 16), [0], memory_limit=2**30)


# ---- bundles -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(system: UnCLIP, tiny_clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    upsampler = system.upsamplers[0]
    save_part(root / "decoder", "decoder", system.decoder.config, system.decoder.network.state_dict())
    save_part(root / "upsampler", "upsampler", upsampler.config, upsampler.network.state_dict())
    return {"clip": tiny_clip_folder, "decoder": root / "decoder", "upsampler_256": root / "upsampler"}


def test_a_bundle_carries_its_autoencoders(
    system: UnCLIP, parts: dict[str, Path], tmp_path: Path, run_cli: Run
) -> None:
    """It may be moved, and its autoencoders' first place may go; it is told of whole and published whole."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    assemble(first, parts, {"license": "mit"}, dtype="float32")
    first.rename(moved)
    body = read_part_json(moved / "decoder", "decoder")["config"]["latent"]
    assert body["name"] == CARRIED and str(tmp_path) not in (moved / "decoder" / CARRIED / "config.json").read_text()
    model, image = UnCLIP.from_pretrained(moved, device="cpu"), pictures(1, 16)
    assert model.sizes == (16, 32)
    for one in (model.decoder.config, model.upsamplers[0].config):
        assert one.latent is not None and one.latent.name.startswith(str(moved))
    drawn = model.variations(image, seed=5, output="tensor")
    torch.testing.assert_close(drawn, system.variations(image, seed=5, output="tensor"))
    assert model.origin.decoder == system.origin.decoder  # so that stored latents are still its own
    files = set(bundle_files(moved, json.loads((moved / "unclip.json").read_text())))
    weights = "diffusion_pytorch_model.safetensors"
    assert {f"decoder/{CARRIED}/{weights}", f"upsampler_256/{CARRIED}/config.json"} <= files
    code, out, _ = run_cli("info", "--model", moved, "--json")
    told = json.loads(out)["model"]["parts"]["decoder"]
    own = sum(p.numel() for p in system.decoder.network.parameters())
    frozen = sum(p.numel() for p in system.decoder.autoencoder.parameters())  # type: ignore[union-attr]
    assert code == 0 and (told["parameters"], told["latents"]["parameters"]) == (own, frozen)
    code, out, _ = run_cli("info", "--model", moved)
    assert "in latents of 4 channels, 2 px a side, of an autoencoder (its own, 0." in out
    again = tmp_path / "again"
    inside = json.loads((moved / "unclip.json").read_text())["parts"]
    assemble(again, {part: moved / name for part, name in inside.items()}, dtype="float32")
    shutil.rmtree(moved)
    torch.testing.assert_close(
        UnCLIP.from_pretrained(again, device="cpu").variations(image, seed=5, output="tensor"), drawn
    )
    shutil.rmtree(again / "decoder" / CARRIED)
    with pytest.raises(UnclipError, match="is incomplete: the folder 'autoencoder' with its autoencoder is missing"):
        UnCLIP.from_pretrained(again, device="cpu")


def test_an_autoencoder_of_the_hub_stays_a_name(parts: dict[str, Path], tmp_path: Path) -> None:
    named = tmp_path / "decoder"
    shutil.copytree(parts["decoder"], named)
    body = json.loads((named / "config.json").read_text())
    body["config"]["latent"]["name"] = "user/vae"
    (named / "config.json").write_text(json.dumps(body))
    assemble(tmp_path / "bundle", {**parts, "decoder": named})
    kept = read_part_json(tmp_path / "bundle" / "decoder", "decoder")["config"]["latent"]["name"]
    assert kept == "user/vae" and not (tmp_path / "bundle" / "decoder" / CARRIED).exists()
    body["config"]["latent"] = {**latent_of(read_latent_name(parts)), "scale": 0.9}
    (named / "config.json").write_text(json.dumps(body))
    with pytest.raises(UnclipError, match="name the one that it was trained with"):
        assemble(tmp_path / "other", {**parts, "decoder": named})
    assert not (tmp_path / "other").exists()


def read_latent_name(parts: dict[str, Path]) -> str:
    name = read_part_json(parts["decoder"], "decoder")["config"]["latent"]["name"]
    assert isinstance(name, str)
    return name


def test_merged_adapters_keep_the_autoencoder(parts: dict[str, Path], tmp_path: Path) -> None:
    stage = UpsamplerStage.load(parts["upsampler_256"])
    add_adapter(stage.network, LoRAConfig(target=("conv",)))
    learned = adapter_state(stage.network.state_dict())
    save_adapter(tmp_path / "adapter", "upsampler", stage.config, stage.network, learned)
    assemble(tmp_path / "bundle", parts, dtype="float32")
    merge(tmp_path / "merged", tmp_path / "bundle", [tmp_path / "adapter"], dtype="float32")
    shutil.rmtree(tmp_path / "bundle")
    model = UnCLIP.from_pretrained(tmp_path / "merged", device="cpu")
    latent = model.upsamplers[0].config.latent
    assert latent is not None and latent.name == str(tmp_path / "merged" / "upsampler_256" / CARRIED)
    assert model.upsamplers[0].sample(pictures(1, 16), [0]).shape == (1, 3, 32, 32)


# ---- planning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["decoder", "upsampler"])
def test_a_plan_counts_the_autoencoder(autoencoders: dict[str, str], tmp_path: Path, stage: str) -> None:
    """Its parameters, and its passes over each image: what they add to a run is what they cost by themselves."""
    frozen = FrozenAutoencoder.load(autoencoders["kl"])

    def planned(name: str) -> tuple[float, dict[str, Any], tuple[str, ...]]:
        body: dict[str, Any] = recipe(name, tmp_path / "run", condition="latent").model_dump(mode="json")
        if stage == "decoder":
            config = latent_decoder(autoencoders["kl"]).config.model_copy(update={"latent": None})
            body = {"clip": "no/clip", "model": config.model_dump(mode="json"), "train": body["train"]}
            body["data"] = {"source": "synthetic", "image_size": 16}
        body["model"]["latent"] = {"name": name, "factor": 2}
        (tmp_path / "plan.json").write_text(json.dumps(body))  # JSON is YAML
        asked = read_recipe(tmp_path / "plan.json", stage=stage)
        with planning_tensors():
            workload = open_workload(asked)
            probe = trace_step(workload.network, workload.run, 2, bfloat16=False)
            sizes = {part: sum(p.numel() for p in one.parameters()) for part, one in workload.frozen.items()}
        return probe.flops.frozen, sizes, asked.assumptions

    flops, sizes, _ = planned(autoencoders["kl"])
    named_flops, named_sizes, assumptions = planned("user/vae")
    assert sizes == {"autoencoder": sum(p.numel() for p in frozen.parameters())} and named_sizes == {}
    assert any("the autoencoder 'user/vae' is no local folder" in told for told in assumptions)
    with FlopCounterMode(display=False) as counted:
        frozen.encode(torch.zeros(2, 3, 16 if stage == "decoder" else 8, 16 if stage == "decoder" else 8))
        if stage == "upsampler":
            frozen.encode(torch.zeros(2, 3, 4, 4))  # of the condition
    assert counted.get_total_flops() > 0
    assert flops - named_flops == counted.get_total_flops()


# ---- manipulations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_inversion_happens_in_latents(autoencoders: dict[str, str], tiny_clip_folder: Path, kind: str) -> None:
    """A decoder that predicts no noise has DDIM as a scaling: x_T gives back what the autoencoder keeps."""
    stage = latent_decoder(autoencoders[kind], shake=0)
    model = UnCLIP(FrozenCLIP.load(str(tiny_clip_folder)), stage)
    image = pictures(2, 16)
    latents = model.encode(image, steps=5)
    assert latents.noise is not None and latents.noise.shape == (2, stage.config.channels, 8, 8)
    assert stage.autoencoder is not None
    kept = stage.autoencoder.decode(stage.autoencoder.encode(image))
    if kind == "kl":
        torch.testing.assert_close(model.reconstruct(latents, output="tensor"), kept, atol=1e-4, rtol=0)
    else:  # where codes lie close, rounding chooses
        found = model.reconstruct(latents, output="tensor")
        assert isinstance(found, Tensor) and ((found - kept).abs() < 1e-4).float().mean() > 0.9


def test_a_picture_comes_back_from_its_noise(calm: UnCLIP, tmp_path: Path) -> None:
    image = pictures(1, 16)
    latents = calm.encode(image, steps=15, refinements=3)
    latents.save(tmp_path / "latents.safetensors")
    again = calm.reconstruct(Latents.load(tmp_path / "latents.safetensors"), size=16, output="tensor")
    frozen = calm.decoder.autoencoder
    assert frozen is not None and isinstance(again, Tensor)
    kept = frozen.decode(frozen.encode(image))
    assert (again - kept).abs().mean() < 0.02 < (again - kept.flip(3)).abs().mean()
    trip = calm.round_trip(image, steps=5)
    assert trip.image.shape == (1, 3, 32, 32) and np.isfinite(trip.psnr)


@pytest.mark.parametrize("noise", ["inverted", "fixed"])
def test_interpolation_ends_at_its_pictures(system: UnCLIP, noise: str) -> None:
    ends = [pictures(1, 16), -pictures(1, 16)]
    way = system.between(ends, frames=3, noise=noise, steps=8)  # type: ignore[arg-type]
    drawn = system.frames_of(way, seed=4, size=16, output="tensor")
    assert isinstance(drawn, Tensor) and drawn.shape == (3, 3, 16, 16)
    assert (way.noise is None) == (noise == "fixed")
    for place, end in ((0, ends[0]), (2, ends[1])):
        if noise == "fixed":
            alone = system.variations(end, seed=4, size=16, output="tensor")
        else:  # both ends are inverted together, over the same timesteps
            alone = system.reconstruct(system.encode(end, steps=list(way.timesteps)), size=16, output="tensor")
        torch.testing.assert_close(drawn[place : place + 1], alone, atol=1e-3, rtol=0)


def test_sdedit_begins_at_the_pictures_latents(system: UnCLIP) -> None:
    image, stage = pictures(1, 16), system.decoder
    given: dict[str, Any] = {"keep_embedding": 1.0, "size": 16, "output": "tensor", "seed": 3}
    none = system.edit(image, strength=0.0, **given)
    torch.testing.assert_close(none, stage.to_pixels(stage.to_x_start(image)))
    forgotten = system.edit(image, strength=1.0, **given)
    torch.testing.assert_close(forgotten, system.variations(image, seed=3, size=16, output="tensor"))
    little = system.edit(image, strength=0.005, **given)
    assert isinstance(little, Tensor) and isinstance(none, Tensor) and isinstance(forgotten, Tensor)
    assert 0 < (little - none).abs().mean() < 0.2 * (forgotten - none).abs().mean()


def test_repaint_keeps_what_is_outside_the_mask(system: UnCLIP) -> None:
    """In latents what is kept is kept about; the picture itself puts it back to the bit."""
    image, mask = pictures(1, 24)[0], torch.zeros(24, 24)
    mask[8:16, 9:15] = 1
    painted = system.inpaint(image, mask, num_images=2, output="tensor", size=32)
    bits = ((image + 1) * 127.5).round()
    kept = ((painted + 1) * 127.5).round()
    assert isinstance(painted, Tensor) and painted.shape == (2, 3, 24, 24)
    assert (kept[:, :, mask == 0] == bits[:, mask == 0]).all()
    assert (painted[0][:, mask == 1] - image[:, mask == 1]).abs().mean() > 0.01
    assert (painted[0] - painted[1]).abs().max() > 0
    wider = system.outpaint(image, right=8, output="tensor")
    assert isinstance(wider, Tensor) and wider.shape == (1, 3, 24, 32)


def test_statistics_are_of_latents(system: UnCLIP, tiny_clip_folder: Path) -> None:
    """Γ_t of a decoder that predicts no noise is 0, and the data's variance that of the latents."""
    from decoder.analytic import measure_statistics
    from unclip.training import EmbeddingMemo

    name = system.decoder.config.latent.name  # type: ignore[union-attr]
    stage, images = latent_decoder(name, shake=0), pictures(4, 16)
    memo = EmbeddingMemo(FrozenCLIP.load(str(tiny_clip_folder)), 0, unit_length=True)
    batches = [{"image": images, "caption": ["a", "b", "c", "d"]}]
    found = measure_statistics(stage, memo, batches, 4, timesteps=[0, 500, 999])
    assert found.epsilon_square == (0.0, 0.0, 0.0) and found.noise_limit is None
    latents = stage.to_x_start(images).double()
    assert found.data_variance == pytest.approx(float(latents.var(dim=0, unbiased=False).mean()), rel=1e-5)
