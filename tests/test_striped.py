"""Running a network in stripes: the result of a whole run, within the memory it is given."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.config import parse_config
from unclip.errors import UnclipError, UsageError
from unclip.nn import UNet, UNetConfig
from unclip.nn.config import EfficientUNetConfig
from unclip.nn.efficient_unet import EfficientUNet
from unclip.nn.storage import FileRows, StripeMemory, TensorRows, _Peak, peak_memory
from unclip.nn.striped import run_striped
from upsamplers import Upsampler, UpsamplerConfig, UpsamplerStage

NETWORKS: dict[str, Any] = {
    "adm": UNetConfig(model_channels=16, channel_mult=(1, 2, 2), num_res_blocks=1),
    "karlo": UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, scale_shift_norm=False),
    "ddpm": UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, resblock_updown=False),
    "patched": UNetConfig(model_channels=16, channel_mult=(1, 1, 2), num_res_blocks=(0, 1, 1), patch_size=4),
    "refined": UNetConfig(model_channels=16, channel_mult=(1,), num_res_blocks=1, patch_size=2, refine_channels=8),
    "attention": UNetConfig(
        image_size=32, model_channels=16, head_channels=16, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(16,),
    ),
    "efficient": EfficientUNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 2)),
    "efficient_attention": EfficientUNetConfig(
        model_channels=16, head_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), patch_size=2,
        bottom_attention=True,
    ),
}


def build(name: str) -> nn.Module:
    """A network whose zero-initialised layers are not zero."""
    config = NETWORKS[name]
    torch.manual_seed(0)
    network = EfficientUNet(config, 6, 3) if isinstance(config, EfficientUNetConfig) else UNet(config, 6, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs(height: int = 48, width: int = 32, batch: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, 6, height, width, generator=random), torch.full((batch,), 400)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_stripes_give_the_result_of_a_whole_run(name: str) -> None:
    network, (x, t) = build(name), inputs(batch=2)
    with torch.no_grad():
        whole = network(x, t)
    assert float(whole.std()) > 0.1
    spilled = []
    for limit in (2**28, 5 * 2**20, 3 * 2**19):
        memory = StripeMemory(limit, "cpu")
        result = run_striped(network, x, t, memory=memory)
        assert float((result - whole).abs().max()) <= 1e-5
        assert memory.used == 0, "every map is let go"
        spilled.append(memory.spilled)
    assert spilled[0] == 0 and (name not in ("adm", "karlo", "ddpm") or spilled[-1] > 0)


@pytest.mark.parametrize("name, shares", [("adm", (0.5, 0.35)), ("efficient", (0.8,))])
def test_the_work_stays_within_the_limit(name: str, shares: tuple[float, ...]) -> None:
    network, (x, t) = build(name), inputs(96, 32)
    with torch.no_grad(), _Peak() as whole:
        network(x, t)
    for share in shares:
        limit = int(share * whole.most)
        with _Peak() as striped:
            run_striped(network, x, t, memory=StripeMemory(limit, "cpu"))
        result = 3 * 96 * 32 * 4  # put together from stripes: there twice
        assert striped.most <= limit + 2 * result


def test_a_whole_run_is_measured_without_running_it() -> None:
    network, (x, t) = build("adm"), inputs()
    foreseen = peak_memory(network, x.to("meta"), t.to("meta"))
    with torch.no_grad(), _Peak() as seen:
        network(x, t)
    assert foreseen == pytest.approx(seen.most, rel=0.02)
    double = peak_memory(network, torch.empty(2, *x.shape[1:], device="meta"), t.to("meta").expand(2))
    assert double == pytest.approx(2 * foreseen, rel=0.02)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_every_operation_in_stripes_of_any_height(rows: int) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.wide = nn.Conv2d(4, 8, 5, padding=2)
            self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=2)
            self.norm = nn.GroupNorm(4, 8)
            self.point = nn.Conv2d(8, 12, 1)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            h = F.relu(self.wide(x)) * scale + 0.5
            small = F.interpolate(self.strided(h), scale_factor=2)
            pooled = F.interpolate(F.avg_pool2d(h, 2), scale_factor=2, mode="nearest")
            h = self.norm(self.grouped(torch.cat([small, pooled], dim=1))) + h
            h = F.dropout(h, 0.5, training=False)
            return F.pixel_shuffle(self.point(h), 2)

    network, random = Mixed(), torch.Generator().manual_seed(3)
    x, scale = torch.randn(1, 4, 18, 10, generator=random), torch.rand(1, 8, 1, 1, generator=random)
    with torch.no_grad():
        whole = network(x, scale)
    memory = StripeMemory(2**28, "cpu")
    memory.stripes = lambda shape, work: [  # type: ignore[method-assign]
        (first, min(first + rows, shape[2])) for first in range(0, shape[2], rows)
    ]
    assert torch.allclose(run_striped(network, x, scale, memory=memory), whole, atol=1e-5)


def test_group_norm_of_a_far_off_mean_is_as_exact_as_the_whole_one() -> None:
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(1, 4, 33, 8, generator=torch.Generator().manual_seed(4)) * 0.1 + 50
    memory = StripeMemory(2**28, "cpu")
    memory.stripes = lambda shape, work: [(i, i + 1) for i in range(shape[2])]  # type: ignore[method-assign]
    striped = run_striped(norm, x, memory=memory)
    exact = F.group_norm(x.double(), 2)
    assert float((striped - exact).abs().max()) <= float((norm(x).detach() - exact).abs().max()) + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tensor", "file"])
def test_rows_come_back_as_they_were_written(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    cpu = torch.device("cpu")
    rows = FileRows(values.shape, dtype) if kind == "file" else TensorRows(values.shape, dtype, cpu, cpu)
    for first, end in ((3, 7), (0, 3)):
        rows.write(first, values[:, :, first:end])
    assert torch.equal(rows.read(0, 7), values) and torch.equal(rows.read(2, 4), values[:, :, 2:4])


def test_what_cannot_be_done_is_said() -> None:
    network, (x, t) = build("adm"), inputs()
    with pytest.raises(UnclipError, match="the network needs at least"):
        run_striped(network, x, t, memory=StripeMemory(20_000, "cpu"))
    with pytest.raises(TypeError, match="softmax"):
        run_striped(nn.Softmax(dim=1), x, memory=StripeMemory(2**20, "cpu"))
    with pytest.raises(RuntimeError, match="eval mode"):
        run_striped(nn.Dropout(0.5), x, memory=StripeMemory(2**20, "cpu"))


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FileRows((1, 2, 4, 4), torch.float32)

    class Full:
        def seek(self, _place: int) -> None: ...

        def write(self, _content: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows, "file", Full())
    with pytest.raises(UnclipError, match="No space left on device; raise the limit or set TMPDIR"):
        rows.write(0, torch.zeros(1, 2, 4, 4))


# ---- upsamplers within a limit -----------------------------------------------------------------------------


def stage(**changes: Any) -> UpsamplerStage:
    body = {
        "low_size": 16,
        "high_size": 64,
        "unet": {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1},
        "diffusion": {"prediction": "x_start"},
        "residual": True,
        "steps": 2,
        **changes,
    }
    torch.manual_seed(0)
    network = Upsampler(parse_config(UpsamplerConfig, body))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return UpsamplerStage.from_network(network)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"unet": {"kind": "efficient", "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": [1, 1]}},
        {"last_step_network": True, "noise_augmentation": 200, "noise_level": 50},
    ],
)
def test_an_upsampler_within_a_limit_draws_the_same_picture(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upsamplers.sampling._LIBRARY", 0)
    system = stage(**changes)
    low_res = torch.rand(2, 3, 24, 17, generator=torch.Generator().manual_seed(5)) * 2 - 1  # 96 x 68: padded
    whole = system.sample(low_res, [0, 1])
    made: list[StripeMemory] = []
    monkeypatch.setattr("upsamplers.sampling.StripeMemory", lambda *a: made.append(StripeMemory(*a)) or made[-1])
    roomy = system.sample(low_res, [0, 1], memory_limit=2**30)
    assert torch.allclose(roomy, whole, atol=1e-5) and not made
    beside = 16 * 3 * 96 * 68 * 4 + 2 * 4 * max(p.numel() for p in system.network.parameters())
    tight = beside + 2**20
    result = system.sample(low_res, [0, 1], memory_limit=tight)
    # One forward pass is equal to 1e-5 (above); the steps of a random network enlarge that.
    assert made and float((result - whole).abs().max()) <= 5e-5


def test_a_limit_that_is_too_small_is_refused() -> None:
    low_res = torch.zeros(1, 3, 16, 16)
    for limit, message in ((10, "beside feature maps it takes"), (0, "expected 1 or more")):
        with pytest.raises(UnclipError, match=message):
            stage().sample(low_res, [0], memory_limit=limit)
    assert issubclass(UsageError, UnclipError)


def test_the_bundled_second_upsampler_in_stripes() -> None:
    folder = Path(__file__).parents[1] / "unclip" / "models" / "emoji" / "upsampler_1024"
    system = UpsamplerStage.load(folder)
    low_res = torch.rand(1, 3, 40, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    x, t = torch.randn(1, 3, 160, 256, generator=torch.Generator().manual_seed(7)), torch.tensor([500])
    with torch.no_grad():
        whole = system.network(x, t, low_res)
        memory = StripeMemory(2 * 2**20, "cpu")
        striped = system.network(x, t, low_res, memory=memory)
    assert memory.spilled and float((striped - whole).abs().max()) <= 1e-5
