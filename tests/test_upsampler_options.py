"""The upsamplers' options: Efficient U-Net, noise augmentation, last-step network, crop fraction; each one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_upsampler import randomised, scenes
from torch import Tensor

from unclip.bundle import save_part
from unclip.config import parse_config
from unclip.data import build_batches
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError
from unclip.nn.config import EfficientUNetConfig
from unclip.nn.efficient_unet import EfficientUNet
from upsamplers.config import ADMConfig, UpsamplerConfig, UpsamplerRunConfig
from upsamplers.network import Upsampler, upsample
from upsamplers.objective import downsample, make_condition, upsampler_loss
from upsamplers.sampling import KIND, UpsamplerStage
from upsamplers.train import _freeze, start_from

ADM: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "patch_size": 4}
EFFICIENT: dict[str, Any] = {
    "kind": "efficient",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 2],
    "patch_size": 2,
}


def small(**changes: Any) -> UpsamplerConfig:
    body = {
        "low_size": 8,
        "high_size": 32,
        "unet": ADM,
        "diffusion": {"prediction": "x_start"},
        "residual": True,
        "steps": 2,
        "lowest_timestep": 60,
        **changes,
    }
    return parse_config(UpsamplerConfig, body)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(network: Upsampler, truth: Tensor, steps: int, share: float = 0.25) -> list[float]:
    """Over-fit on `truth`; the mean loss of every step."""
    config, random = network.config, generator()
    process = GaussianDiffusion(config.diffusion)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = upsampler_loss(network, process, config, {"image": truth}, random, share)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# ---- every option trains -----------------------------------------------------------------------------------

ONE_LEVEL: dict[str, Any] = {**ADM, "channel_mult": [1]}
PLAIN: dict[str, Any] = {"residual": False, "unet": {**ONE_LEVEL, "patch_size": 1}}  # 48 numbers of a patch need room
# Changes of the configuration, steps, and the share of the first losses that the last ones must have fallen below.
OPTIONS: dict[str, tuple[dict[str, Any], int, float]] = {
    "x_start": ({}, 24, 0.5),
    "epsilon": ({**PLAIN, "diffusion": {"prediction": "epsilon"}}, 24, 0.6),
    "v": ({**PLAIN, "diffusion": {"prediction": "v"}}, 50, 0.7),
    "learned_range": ({**PLAIN, "diffusion": {"prediction": "v", "variance": "learned_range"}}, 50, 0.7),
    "efficient": ({"unet": EFFICIENT}, 24, 0.7),
    "efficient_attention": ({"unet": {**EFFICIENT, "bottom_attention": True, "head_channels": 16}}, 24, 0.7),
    "no_scale_shift": ({"unet": {**ONE_LEVEL, "scale_shift_norm": False}}, 24, 0.5),
    "blur": ({"corruption": {"kind": "blur"}}, 24, 0.5),
    "bsr": ({"corruption": {"kind": "bsr"}}, 24, 0.7),
    "bsrgan": ({"corruption": {"kind": "bsrgan"}}, 24, 0.75),
    "noise_augmentation": ({"noise_augmentation": 300}, 30, 0.8),
    "last_step_network": ({"last_step_network": True}, 24, 0.6),
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_learns_a_tiny_set(name: str) -> None:
    changes, steps, share = OPTIONS[name]
    torch.manual_seed(0)
    corruption = {} if "corruption" in changes else {"corruption": {"kind": "none"}}
    network = Upsampler(small(**{"low_size": 4, "high_size": 16, "unet": ONE_LEVEL, **corruption, **changes}))
    losses = train(network, scenes(8, 16), steps)
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < share * first, (first, last)


# ---- Efficient U-Net ---------------------------------------------------------------------------------------


def test_efficient_network_has_imagens_shape() -> None:
    with torch.device("meta"):
        network = EfficientUNet(EfficientUNetConfig(), 6, 3)
        seen: list[tuple[int, ...]] = []
        for level in (*network.down, *network.up):
            level.blocks[-1].register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape[1:3])))
        output = network(torch.empty(1, 6, 64, 64), torch.zeros(1).long())
    assert output.shape == (1, 3, 64, 64) and network.multiple == 16
    # Channels and height of each level: no residual block runs above half the edge (Imagen, App. B.1).
    assert seen == [(128, 32), (256, 16), (512, 8), (1024, 4), (1024, 4), (512, 8), (256, 16), (128, 32)]
    assert [len(level.blocks) for level in network.down] == [2, 4, 8, 8]
    assert [len(level.blocks) for level in network.up] == [8, 8, 4, 2]
    assert all(level.downsample.stride == (2, 2) for level in network.down)


def test_efficient_skips_are_scaled() -> None:
    network = EfficientUNet(EfficientUNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 1)), 6, 3)
    given: list[Tensor] = []
    made: list[Tensor] = []
    network.up[1].register_forward_pre_hook(lambda _m, inputs: given.append(inputs[0]))
    network.down[0].register_forward_hook(lambda _m, _i, output: made.append(output))
    network(torch.randn(1, 6, 16, 16, generator=generator()), torch.tensor([5]))
    assert torch.allclose(given[0][:, 8:], made[0] * 0.5**0.5, atol=1e-6)


def test_an_untrained_efficient_upsampler_is_the_interpolation_and_sees_time_and_level() -> None:
    low_res, t = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1, torch.tensor([3, 900])
    x_t = torch.randn(2, 3, 32, 32, generator=generator(1))
    fresh = Upsampler(small(unet=EFFICIENT))
    assert torch.equal(fresh(x_t, t, low_res), upsample(low_res, (32, 32)))
    network = randomised(small(unet=EFFICIENT, noise_augmentation=500))
    with torch.no_grad():
        first = network(x_t, t, low_res, torch.tensor([0, 0]))
        assert not torch.allclose(first, network(x_t, t.flip(0), low_res, torch.tensor([0, 0])), atol=1e-4)
        second = network(x_t, t, low_res, torch.tensor([0, 400]))
    assert torch.allclose(first[0], second[0], atol=1e-6) and not torch.allclose(first[1], second[1], atol=1e-4)


# ---- noise augmentation ------------------------------------------------------------------------------------


def test_training_levels_are_uniform_and_the_condition_carries_that_noise() -> None:
    config = small(noise_augmentation=200, corruption={"kind": "none"})
    process, heard = GaussianDiffusion(config.diffusion), {}

    def network(x_t: Tensor, _t: Tensor, low_res: Tensor, noise_level: Tensor) -> Tensor:
        heard.update(low_res=low_res, level=noise_level)
        return torch.zeros_like(x_t)

    truth = torch.zeros(3000, 3, 8, 8)
    upsampler_loss(network, process, config, {"image": truth}, generator())
    level = heard["level"]
    assert int(level.min()) == 0 and int(level.max()) == 200
    assert float(level.float().mean()) == pytest.approx(100, abs=4)  # standard deviation of the mean 1.06
    for low, high in ((1, 60), (120, 200)):
        chosen = (level >= low) & (level <= high)
        variance = torch.as_tensor(1 - process.alphas_cumprod)[level[chosen] - 1].mean()
        assert float(heard["low_res"][chosen].pow(2).mean()) == pytest.approx(float(variance), rel=0.1)
    assert torch.equal(heard["low_res"][level == 0], torch.zeros_like(heard["low_res"][level == 0]))


def test_the_noise_level_at_sampling() -> None:
    system = UpsamplerStage.from_network(randomised(small(noise_augmentation=300, noise_level=100)))
    low_res = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    default = system.sample(low_res, [1, 2])
    assert torch.allclose(default, system.sample(low_res, [1, 2], noise_level=100))
    assert not torch.allclose(default, system.sample(low_res, [1, 2], noise_level=0), atol=1e-3)
    alone = system.sample(low_res[1:], [2])
    assert torch.allclose(default[1:], alone, atol=1e-5)
    for level in (-1, 301):
        with pytest.raises(UsageError, match=r"knows 0 \(none\) to 300"):
            system.sample(low_res, [1, 2], noise_level=level)
    plain = UpsamplerStage.from_network(randomised(small()))
    assert torch.equal(plain.sample(low_res, [1, 2], noise_level=0), plain.sample(low_res, [1, 2]))
    with pytest.raises(UsageError, match="without noise augmentation"):
        plain.sample(low_res, [1, 2], noise_level=5)


# ---- last-step network -------------------------------------------------------------------------------------


def test_the_last_network_takes_the_last_step_alone() -> None:
    system = UpsamplerStage.from_network(randomised(small(last_step_network=True, steps=4)))
    heard: list[str] = []
    system.network.unet.register_forward_hook(lambda *_: heard.append("first"))
    system.network.last_unet.register_forward_hook(lambda *_: heard.append("last"))
    low_res = torch.zeros(1, 3, 8, 8)
    system.sample(low_res, [0])
    assert heard == ["first"] * 3 + ["last"]
    heard.clear()
    system.sample(low_res, [0], steps=1)  # a single step is at the other end
    assert heard == ["first"]


def test_karlos_seven_steps_end_with_the_second_network() -> None:
    from unclip.config import load_config

    file = Path(__file__).parents[1] / "configs" / "upsampler" / "karlo.yaml"
    model = load_config(UpsamplerRunConfig, file).model
    tiny = model.model_copy(update={"unet": ADMConfig(**ADM, scale_shift_norm=False)})
    system = UpsamplerStage.from_network(randomised(tiny))
    steps: list[tuple[str, int]] = []
    for name in ("unet", "last_unet"):
        module = getattr(system.network, name)
        module.register_forward_pre_hook(lambda _m, inputs, n=name: steps.append((n, int(inputs[1][0]))))
    system.sample(torch.zeros(1, 3, 4, 4), [0])
    assert steps == [("unet", t) for t in (999, 832, 666, 500, 333, 166)] + [("last_unet", 0)]


def test_samples_of_a_batch_go_to_the_network_of_their_timestep() -> None:
    network = randomised(small(last_step_network=True))
    x = torch.randn(4, 3, 32, 32, generator=generator())
    low_res, t = torch.zeros(4, 3, 8, 8), torch.tensor([60, 500, 60, 61])
    with torch.no_grad():
        together = network(x, t, low_res)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], low_res[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("timesteps", [[60, 60], [500, 500], [60, 500]])
def test_in_training_both_networks_have_gradients_whatever_the_timesteps(timesteps: list[int]) -> None:
    """Processes that had other samples would else sum other gradients, or wait for each other's weights."""
    network = randomised(small(last_step_network=True)).train()
    x = torch.randn(2, 3, 32, 32, generator=generator())
    t, low_res = torch.tensor(timesteps), torch.zeros(2, 3, 8, 8)
    output = network(x, t, low_res)
    with torch.no_grad():
        assert torch.allclose(output, network.eval()(x, t, low_res), atol=1e-5)
    output.square().mean().backward()
    last = t <= network.last_timestep
    for unet, used in ((network.unet, ~last), (network.last_unet, last)):
        gradients = [parameter.grad for parameter in unet.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients if gradient is not None) == bool(used.any())
    network.unet.requires_grad_(False)
    heard: list[int] = []
    network.train().unet.register_forward_hook(lambda *_: heard.append(1))
    network(x, torch.tensor([60, 60]), low_res)
    assert not heard, "what does not learn has no gradient to agree on"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_samples_for_the_last_step_is_counted(share: float) -> None:
    config, heard = small(last_step_network=True), []

    def network(x_t: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        heard.append(t)
        return torch.zeros_like(x_t)

    truth = torch.zeros(2000, 3, 4, 4)
    upsampler_loss(network, GaussianDiffusion(config.diffusion), config, {"image": truth}, generator(), share)
    assert int((heard[0] == 60).sum()) == pytest.approx(2000 * share, abs=4 * 19.4)
    assert int(heard[0].min()) >= 60 and (share == 1 or int(heard[0].max()) > 900)


def test_the_last_network_is_fine_tuned_from_the_first_and_leaves_it_alone(tmp_path: Path) -> None:
    first = randomised(small())
    save_part(tmp_path / "first", KIND, first.config, first.state_dict())
    config = parse_config(
        UpsamplerRunConfig,
        {
            "model": small(last_step_network=True).model_dump(),
            "data": {"image_size": 32},
            "last_step_share": 1,
        },
    )
    network = Upsampler(config.model)
    start_from(network, tmp_path / "first")
    _freeze(network, config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert all(torch.equal(before[f"last_{n}"], v) for n, v in before.items() if n.startswith("unet."))
    train(network, scenes(4, 32), 2, share=1)
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("unet."))
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("last_unet."))


def test_starting_from_another_upsampler(tmp_path: Path) -> None:
    first = randomised(small())
    save_part(tmp_path / "first", KIND, first.config, first.state_dict())
    changed = Upsampler(small(residual=False, diffusion={"prediction": "v"}, noise_augmentation=100))
    start_from(changed, tmp_path / "first")
    state = changed.state_dict()
    assert torch.equal(state["unet.conv_in.weight"], first.state_dict()["unet.conv_in.weight"])
    assert float(state["unet.conv_out.weight"].abs().max()) == 0 and "level_embed.0.weight" in state
    with pytest.raises(UnclipError, match="do not fit"):
        start_from(Upsampler(small(unet={**ADM, "model_channels": 32})), tmp_path / "first")


# ---- crops -------------------------------------------------------------------------------------------------


def run_config(**changes: Any) -> UpsamplerRunConfig:
    return parse_config(UpsamplerRunConfig, {"model": small().model_dump(), "data": {"image_size": 32}, **changes})


def test_a_crop_fraction_sets_the_crops_that_training_sees() -> None:
    config = run_config(crop_fraction=0.25)
    assert config.data.crop_size == 8
    batch = next(build_batches(config.data, batch_size=64))["image"]
    assert batch.shape == (64, 3, 8, 8)
    whole = next(build_batches(config.data.model_copy(update={"crop_size": None}), batch_size=64))["image"]
    places = set()
    for crop, image in zip(batch, whole, strict=True):
        windows = image.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 25, 25, 8, 8)
        equal = (windows == crop[:, None, None]).flatten(3).all(-1).all(0)
        assert bool(equal.any()), "a crop is cut out of its image and not resized"
        places.add(tuple(int(i) for i in equal.nonzero()[0]))
    assert len(places) > 20
    again = parse_config(UpsamplerRunConfig, config.model_dump(mode="json"))
    assert again == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop_fraction": 0.3}, "not divisible by the factor"),
        ({"crop_fraction": 0.5, "data": {"image_size": 32, "crop_size": 8}}, "asks for crops of 16"),
        ({"crop_fraction": 0}, "greater than 0"),
        ({"crop_fraction": "a quarter"}, "crop_fraction"),
        ({"last_step_share": 2}, "last_step_share"),
        ({"model": {"unet": {"kind": "effizient"}}}, "adm or efficient"),
        ({"model": {"unet": {"kind": "efficient", "num_res_blocks": [1]}}}, "channel_mult"),
        ({"model": {"unet": {"kind": "efficient", "bottom_atention": True}}}, "unet.bottom_attention"),
        ({"model": {"unet": {"middle_attention": True}}}, "convolutions only"),
        ({"model": {"noise_augmentation": 2000}}, "above diffusion.timesteps"),
        ({"model": {"noise_level": 10}}, "above noise_augmentation"),
        ({"model": {"last_step_network": True, "steps": 1}}, "steps 2 or more"),
        ({"model": {"steps": [0, 1000]}}, "does not exist"),
    ],
)
def test_bad_options_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_config(**changes)


def test_old_configurations_name_no_kind_and_mean_adm() -> None:
    config = parse_config(UpsamplerConfig, {"unet": {"model_channels": 32}})
    assert isinstance(config.unet, ADMConfig) and config.unet.kind == "adm"
    names = set(Upsampler(small()).state_dict())
    assert all(name.startswith("unet.") for name in names)


def test_the_condition_of_an_uncorrupted_batch_is_the_reduction() -> None:
    config, batch = small(corruption={"kind": "none"}), scenes(2, 32)
    assert torch.equal(make_condition(batch, config, generator()), downsample(batch, config))
