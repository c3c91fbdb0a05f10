"""What is told of a run while it trains: losses by quartile, FLOPs, the prior's cosines, samples."""

from __future__ import annotations

import errno
import io
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_prior import DIM, SMALL, text
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prior import Prior, PriorConfig
from prior.dashboard import Dashboard, cosines
from prior.sampling import build_stage
from unclip.clip import TextFeatures
from unclip.config import DataConfig, DiffusionConfig, TrainConfig, WandbConfig, parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError
from unclip.gpus import gpu_of_device
from unclip.runs import read_rows
from unclip.training.distributed import Distributed
from unclip.training.metrics import MetricsFile, Window, parameter_norm
from unclip.training.previews import captioned_grid, fixed_batch
from unclip.training.progress import Progress
from unclip.training.speed import Speed, counting, measured_teraflops

CPU = torch.device("cpu")
QUIET = TrainConfig(wandb=WandbConfig(mode="disabled"))


# ---- losses by quartile of the timestep ----------------------------------------------------------------------


def drawn_losses(seed: int, count: int = 37) -> tuple[dict[str, Tensor], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, 1000, (count,), generator=generator)
    loss = torch.rand(count, generator=generator) * (t + 1)
    return {"loss": loss, "mse": 2 * loss, "quartile": 4 * t // 1000}, t.tolist()


def test_quartiles_equal_a_plain_recomputation() -> None:
    window, by_hand = Window(), {key: list[float]() for key in ("all", "q0", "q1", "q2", "q3")}
    for seed in range(3):
        losses, steps = drawn_losses(seed)
        losses["loss"][5] = math.nan if seed == 1 else losses["loss"][5]
        losses["loss"][6] = math.inf if seed == 2 else losses["loss"][6]
        window.add(losses)
        for value, t in zip(losses["loss"].tolist(), steps, strict=True):
            quarter = "q0" if t < 250 else "q1" if t < 500 else "q2" if t < 750 else "q3"
            for key in ("all", quarter) if math.isfinite(value) else ():
                by_hand[key].append(value)
    told = window.means()
    assert told["loss"] == pytest.approx(sum(by_hand["all"]) / (3 * 37 - 2), rel=1e-12)
    for quarter in ("q0", "q1", "q2", "q3"):
        assert told[f"loss_{quarter}"] == pytest.approx(sum(by_hand[quarter]) / len(by_hand[quarter]), rel=1e-12)
    assert told["loss_q0"] < told["loss_q1"] < told["loss_q2"] < told["loss_q3"]
    assert set(told) == {f"{name}{end}" for name in ("loss", "mse") for end in ("", "_q0", "_q1", "_q2", "_q3")}
    assert window.means() == {}  # a new window has begun


def test_a_window_is_continued_from_a_checkpoint_and_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first = Window(), Window()
    for seed in range(4):
        whole.add(drawn_losses(seed)[0])
    first.add(drawn_losses(0)[0])
    first.add(drawn_losses(1)[0])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = Window()
    second.load_state_dict(torch.load(buffer, weights_only=True))
    second.add(drawn_losses(2)[0])
    second.add(drawn_losses(3)[0])
    expected = whole.means()
    assert second.means() == expected  # bit for bit

    other = Window()
    other.add(drawn_losses(2)[0])
    other.add(drawn_losses(3)[0])
    theirs = torch.stack([other.state_dict()[name] for name in sorted(other.state_dict())])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: table.add_(theirs))
    mine = Window(Distributed(0, 2, CPU))
    mine.add(drawn_losses(0)[0])
    mine.add(drawn_losses(1)[0])
    assert mine.means() == pytest.approx(expected, rel=1e-12)


def test_losses_without_timesteps_have_no_quartiles() -> None:
    window = Window()
    window.add({"loss": torch.tensor([2.0]), "accuracy": torch.tensor([1.0, 0.0, 1.0, 1.0])})
    assert window.means() == {"loss": 2.0, "accuracy": 0.75}


@pytest.mark.parametrize("timesteps", [1000, 10, 4])
def test_the_process_names_each_samples_quarter(timesteps: int) -> None:
    process = GaussianDiffusion(DiffusionConfig(timesteps=timesteps))
    t = torch.arange(timesteps)
    x = torch.zeros(timesteps, 2)
    quartile = process.losses(x, x, x, t, x)["quartile"]
    assert quartile.tolist() == [min(3, int(4 * step / timesteps)) for step in range(timesteps)]
    assert quartile[0] == 0 and quartile[-1] == 3


def test_parameter_norm_of_whole_and_partitioned_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    plain = math.sqrt(sum(float(p.detach().double().square().sum()) for p in network.parameters()))
    assert parameter_norm(network, Distributed(0, 1, CPU)) == pytest.approx(plain, rel=1e-12)
    squares = []
    for rank in range(2):  # as ZeRO-3 leaves them: halves, the second one's end padded with whatever lay there
        for parameter in network.parameters():
            flat, part = parameter.detach().flatten(), -(-parameter.numel() // 2)
            held = torch.full((part,), 1e9)
            own = flat[rank * part : (rank + 1) * part]
            held[: len(own)] = own
            parameter.ds_tensor, parameter.ds_numel = held, parameter.numel()  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: None)
        squares.append(parameter_norm(network, Distributed(rank, 2, CPU)) ** 2)
    assert math.sqrt(sum(squares)) == pytest.approx(plain, rel=1e-12)


# ---- metrics.jsonl -------------------------------------------------------------------------------------------


def test_a_step_has_one_line_whatever_is_told_of_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file, 0)
    metrics.write(1, {"loss": 0.5})
    metrics.write(2, {"loss": 0.123456789})
    metrics.write(2, {"validation_loss": 0.25})
    metrics.write(3, {"loss": 0.1})
    assert read_rows(file) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.123457, "validation_loss": 0.25},
        {"step": 3, "loss": 0.1},
    ]
    with file.open("a") as out:
        out.write('{"step": 2, "loss": 9.0}\n{"step": 4, "lo')  # twice, and cut by a kill
    MetricsFile(file, 2)
    assert [(row["step"], row["loss"]) for row in read_rows(file)] == [(1, 0.5), (2, 9.0)]


def test_metrics_on_a_full_disk_end_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write(1, {"loss": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UnclipError, match=r"metrics.jsonl cannot be written: No space left on device"):
            metrics.write(2, {"loss": 0.25})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UnclipError, match=r"metrics.jsonl cannot be written: No space left on device"):
            MetricsFile(tmp_path / "metrics.jsonl", 0)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


# ---- FLOPs, MFU, the line ------------------------------------------------------------------------------------


class Trained(nn.Module):
    """A network with a checkpointed part."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Linear(6, 8), nn.Linear(8, 3), again

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False) if self.again else self.first(x)
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize("again", [False, True])
def test_flops_are_those_of_the_networks_forward_and_backward(again: bool) -> None:
    """6·8 and 8·3 products a sample, each twice (multiply, add), three times but for the gradient of the input."""
    torch.manual_seed(0)
    network, frozen, x = Trained(again), nn.Linear(6, 6), torch.randn(5, 6)
    with counting(network) as counted:
        with torch.no_grad():
            seen = frozen(x)
        network(seen).square().mean().backward()
    assert counted.total == 5 * 2 * (2 * 6 * 8 + 3 * 8 * 3)
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network(frozen(x).detach()).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert not network._forward_hooks and not network._forward_pre_hooks


def test_flops_of_a_prior_agree_with_pytorchs_counter() -> None:
    torch.manual_seed(0)
    network = Prior(parse_config(PriorConfig, SMALL))
    features, x = text(4), torch.randn(4, DIM)
    given = {
        "text_embedding": features.embedding,
        "text_tokens": features.tokens,
        "text_mask": features.mask,
        "drop_text": torch.zeros(4, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as reference:
        network(x, torch.arange(4), **given).square().mean().backward()
    with counting(network) as counted:
        network(x, torch.arange(4), **given).square().mean().backward()
    assert counted.total == reference.get_total_flops() > 0


def test_mfu_is_the_share_of_the_stated_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("unclip.training.speed.time.perf_counter", lambda: now[0])
    config = TrainConfig(batch_size=32, peak_tflops=2.0)
    speed = Speed(config, CPU, world_size=4, start=10)
    network = nn.Linear(6, 8)
    with speed.counting(network):
        network(torch.ones(8, 6)).sum().backward()  # this process's quarter of the batch
    assert speed.flops_per_image == 2 * 2 * 6 * 8
    speed.flops_per_image = 1e10
    now[0] = 105.0
    told = speed.measure(20)
    assert told["images_per_second"] == pytest.approx(10 * 32 / 5)
    assert told["mfu"] == pytest.approx(64 * 1e10 / (4 * 2e12))
    assert 0.05 < told["memory_gib"] < 1000
    again = speed.counting(network)
    with again:
        network(torch.ones(8, 6)).sum().backward()
    assert speed.flops_per_image == 1e10  # counted once


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = measured_teraflops(torch.float32)
    assert 1e-4 < peak < 1e3
    assert 0.1 < Speed(TrainConfig(), CPU, 1, 0).peak / peak < 10  # type: ignore[operator]


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", None),
    ],
)
def test_gpus_are_known_by_the_drivers_name(name: str, gpu: str | None) -> None:
    found = gpu_of_device(name)
    assert (found.name if found else None) == gpu


def test_a_gpu_without_a_known_peak_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Novelty 9000")
    speed = Speed(TrainConfig(), torch.device("cuda"), 1, 0)
    assert speed.peak is None and "the peak of Novelty 9000 is not known here; set train.peak_tflops" in speed.complaint
    stated = Speed(TrainConfig(peak_tflops=3.5), torch.device("cuda"), 1, 0)
    assert (stated.peak, stated.complaint) == (3.5, "")


def test_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("unclip.training.progress.time.perf_counter", lambda: now[0])
    progress = Progress(50, 10)
    now[0] = 20.0
    row = {"loss": 0.12345, "images_per_second": 1234.5, "mfu": 0.4321, "memory_gib": 1.5}
    progress.show(20, row)
    progress.show(30, {"cos_prediction_real": 0.875})
    progress.show(40, {"unknown": 1.0})
    progress.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "step 20/50  loss 0.1235  1,234.5 images/s  MFU 43.2%  1.50 GiB  01:00 left",
        "step 30/50  cos(prediction, real) 0.875  00:20 left",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(4, 0)
    progress.show(1, {"loss": 0.5, "images_per_second": 10.0, "mfu": 0.25, "memory_gib": 2.0})
    progress.show(1, {"cos_prediction_real": 0.5})
    for _ in range(4):
        progress.advance()
    progress.close()
    last = terminal.getvalue().replace("\n", "\r").split("\r")
    shown = next(line for line in reversed(last) if "4/4" in line)
    assert "loss 0.5, 10.0 images/s, MFU 25.0%, 2.00 GiB, cos(prediction, real) 0.500" in shown


# ---- the prior's dashboard -----------------------------------------------------------------------------------


def test_cosines_equal_a_plain_recomputation() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, real, caption = (torch.randn(7, 5, generator=generator) * (i + 1) for i in range(3))
    names = ["a", "b", "a", "c", "d", "b", "e"]

    def cosine(x: Tensor, y: Tensor) -> float:
        return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))

    def unrelated(x: Tensor) -> float:
        pairs = [(i, j) for i in range(7) for j in range(7) if names[i] != names[j]]
        return sum(cosine(x[i], real[j]) for i, j in pairs) / len(pairs)

    told = cosines(prediction, real, caption, names)
    assert told == pytest.approx(
        {
            "cos_text_real": sum(cosine(caption[i], real[i]) for i in range(7)) / 7,
            "cos_prediction_real": sum(cosine(prediction[i], real[i]) for i in range(7)) / 7,
            "cos_text_prediction": sum(cosine(caption[i], prediction[i]) for i in range(7)) / 7,
            "cos_prediction_unrelated": unrelated(prediction),
            "cos_text_unrelated": unrelated(caption),
            "cos_real_unrelated": unrelated(real),
        },
        rel=1e-9,
    )
    perfect = cosines(3 * real, real, caption, names)
    assert perfect["cos_prediction_real"] == pytest.approx(1)
    assert perfect["cos_text_prediction"] == pytest.approx(perfect["cos_text_real"])
    assert perfect["cos_prediction_unrelated"] == pytest.approx(perfect["cos_real_unrelated"])
    alike = cosines(prediction, real, caption, ["a"] * 7)
    assert set(alike) == {"cos_text_real", "cos_prediction_real", "cos_text_prediction"}


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_dashboard_measures_samples_of_fixed_captions_with_fixed_noise(kind: str) -> None:
    body: dict[str, Any] = {**SMALL, "kind": kind, "candidates": 3}
    if kind == "autoregressive":
        body.pop("steps")
        body |= {"components": 4, "buckets": 8}
    from prior.config import CONFIGS

    model = parse_config(CONFIGS[kind], body)
    torch.manual_seed(0)
    stage = build_stage(model)
    if kind == "autoregressive":
        from prior.statistics import settle, store_codes

        cloud = F.normalize(torch.randn(64, DIM), dim=1)
        store_codes(stage.network, settle(model, cloud)[1], torch.rand(64))  # type: ignore[arg-type]
    real = F.normalize(torch.randn(70, DIM), dim=1)
    seen: list[list[str]] = []

    def embed(batch: Any) -> tuple[Tensor, TextFeatures]:
        seen.append(batch["caption"])
        return real, text(70)

    data = DataConfig(image_size=8, holdout=0.3)
    dashboard = Dashboard(model, data, embed, CPU, 70)
    before = torch.get_rng_state()
    told = dashboard(stage.network)
    assert dashboard(stage.network) == told and len(seen) == 1
    assert torch.equal(torch.get_rng_state(), before)  # training's noise is left alone
    drawn = stage.sample(text(70), range(70), candidates=1)
    assert told["cos_prediction_real"] == pytest.approx(float(F.cosine_similarity(drawn, real).mean()), abs=1e-5)
    assert set(seen[0]) == set(fixed_batch(data, 70)["caption"])


def test_dashboard_before_the_statistics_of_analytic_dpm_are_there() -> None:
    """They are measured when training ends, as `configs/prior/paper.yaml` asks."""
    usual = parse_config(PriorConfig, {**SMALL, "sampler": "ddpm"})
    torch.manual_seed(0)
    network, real = build_stage(usual).network, F.normalize(torch.randn(70, DIM), dim=1)
    told = {
        sampler: Dashboard(
            usual.model_copy(update={"sampler": sampler}), DataConfig(image_size=8), lambda _: (real, text(70)), CPU, 70
        )(network)
        for sampler in ("ddpm", "analytic")
    }
    assert told["analytic"] == told["ddpm"]


# ---- samples on the way --------------------------------------------------------------------------------------


def test_previews_are_the_same_whole_images_every_time() -> None:
    data = DataConfig(image_size=16, crop_size=8, horizontal_flip=True, augment=True, cache=True)
    one, two = fixed_batch(data, 4), fixed_batch(data, 4)
    assert one["image"].shape == (4, 3, 16, 16)
    assert torch.equal(one["image"], two["image"]) and one["caption"] == two["caption"]


def test_grids_carry_captions_below_their_columns() -> None:
    red, blue = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1), torch.tensor([-1.0, -1, 1]).view(1, 3, 1, 1)
    rows = [red.expand(3, 3, 16, 16), blue.expand(3, 3, 16, 16)]
    captions = ["", "a very long caption " * 20, "x" * 500]
    grid = captioned_grid(rows, captions)
    cell = 16 * 7  # the whole factor that brings 16 to 112 pixels
    assert grid.width == 3 * cell + 2 * 4 and grid.height > 2 * (cell + 4) + 40
    assert grid.getpixel((5, 5)) == (255, 0, 0) and grid.getpixel((5, cell + 9)) == (0, 0, 255)

    def ink(column: int) -> int:
        left = column * (cell + 4)
        box = grid.crop((left, 2 * (cell + 4), left + cell, grid.height)).convert("L")
        return sum(1 for value in box.tobytes() if value < 128)

    assert ink(0) == 0 and ink(1) > 100 and ink(2) > 100
    gap = grid.crop((cell, 2 * (cell + 4), cell + 4, grid.height)).convert("L")
    assert min(gap.tobytes()) > 128  # no caption runs into its neighbour
    large = captioned_grid([red.expand(1, 3, 256, 256)], ["a red square"])
    assert large.width == 256
