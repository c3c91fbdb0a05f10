"""Plans: FLOPs and memory against closed forms, PyTorch's counter, DeepSpeed's estimators and measured steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from unclip.nn import UNet, UNetConfig
from unclip.planning import read_recipe
from unclip.planning.rules import GpuRules
from unclip.planning.trace import Probe, Run, StepTrace, planning_tensors, trace_step
from unclip.planning.workload import open_workload

CONFIGS = Path(__file__).parents[1] / "configs"
BUCKET = 4 * 500_000_000
Cli = Callable[..., tuple[int, str, str]]


def step_of(network: nn.Module, shape: tuple[int, ...]) -> Run:
    """A training step of a toy network on (batch, *shape)."""

    def run(batch: int, frozen_done: Callable[[], None]) -> Tensor:
        x = torch.randn(batch, *shape)
        frozen_done()
        return network(x).float().square().mean()  # type: ignore[no-any-return]

    return run


def traced(build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, **options: Any) -> Probe:
    with planning_tensors():
        network = build()
        return trace_step(network, step_of(network, shape), batch, **{"bfloat16": False, **options})


def measured_peak(step: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator held at once during `step`, beyond what it held before."""
    gc.collect()
    gc.disable()  # what died before is not to be counted as freed
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = step()
    finally:
        gc.enable()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---- FLOPs -------------------------------------------------------------------------------------------------------


def test_flops_of_linear_layers() -> None:
    flops = traced(lambda: nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)), (5, 8), 7).flops
    first, second = 2 * 7 * 5 * 8 * 16, 2 * 7 * 5 * 16 * 4
    # The first layer's input needs no gradient.
    assert (flops.forward, flops.backward) == (first + second, first + 2 * second)
    assert flops.recomputed == flops.frozen == 0


def test_flops_of_convolutions() -> None:
    build = lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, stride=2, padding=1))  # noqa: E731
    flops = traced(build, (3, 8, 8), 4).flops
    first, second = 2 * 4 * 64 * 3 * 6 * 9, 2 * 4 * 16 * 6 * 2 * 9
    assert (flops.forward, flops.backward) == (first + second, first + 2 * second)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v)


def test_flops_of_attention() -> None:
    flops = traced(Attention, (10, 32), 3).flops
    projection, product = 2 * 3 * 10 * 32 * 96, 2 * 3 * 2 * 10 * 10 * 16
    assert flops.forward == projection + 2 * product
    # Scores once more, and two gradients of each of the two products.
    assert flops.backward == projection + 5 * product


UNET = {"image_size": 8, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}


class Denoiser(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.unet = UNet(UNetConfig(**{**UNET, **options}), 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x, torch.zeros(len(x), dtype=torch.int64))  # type: ignore[no-any-return]


def test_flops_of_the_unet_by_hand() -> None:
    """Widths 8 and 16 at edges 8 and 4, an embedding of 32, one block a level going down and two coming up."""

    def conv(c_in: int, c_out: int, edge: int, kernel: int = 3) -> int:
        return 2 * edge**2 * c_in * c_out * kernel**2

    def block(c_in: int, c_out: int, edge: int) -> int:
        shortcut = conv(c_in, c_out, edge, 1) if c_in != c_out else 0
        return conv(c_in, c_out, edge) + conv(c_out, c_out, edge) + 2 * 32 * 2 * c_out + shortcut

    down = block(8, 8, 8) + block(8, 8, 4) + block(8, 16, 4)
    middle = 2 * block(16, 16, 4)
    up = block(32, 16, 4) + block(24, 16, 4) + block(16, 16, 8) + block(24, 8, 8) + block(16, 8, 8)
    time = 2 * (8 * 32 + 32 * 32)
    expected = conv(3, 8, 8) + down + middle + up + conv(8, 3, 8) + time
    assert traced(Denoiser, (3, 8, 8), 6).flops.forward == 6 * expected


def test_checkpointing_costs_flops_and_spares_memory() -> None:
    plain = traced(Denoiser, (3, 8, 8), 64)
    saving = traced(lambda: Denoiser(checkpoint_activations=True), (3, 8, 8), 64)
    before, after = plain.flops, saving.flops
    assert (after.forward, after.backward) == (before.forward, before.backward)
    assert before.recomputed == 0 < after.recomputed < after.forward
    assert after.recomputed > 0.5 * after.forward
    assert saving.saved < 0.5 * plain.saved
    assert saving.peak() < plain.peak()


# ---- activations -------------------------------------------------------------------------------------------------


def test_any_batch_follows_from_two() -> None:
    with planning_tensors():
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 5))
        run = step_of(network, (3, 8, 8))
        trace = StepTrace(network, run, bfloat16=True)
        direct = trace_step(network, run, 11, bfloat16=True)
    assert trace.affine
    for share in (0.0, 0.5, 1.0):
        assert trace.at(11).peak(share) == direct.peak(share)
    assert trace.at(11).flops == direct.flops


def test_activations_of_linear_layers_in_closed_form() -> None:
    """Kept for the backward pass: the input, the two outputs around the activation, and what the loss squares."""
    probe = traced(lambda: nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)), (5, 8), 9)
    elements = 9 * 5 * (8 + 16 + 16 + 4)
    assert probe.saved == pytest.approx(4 * elements, abs=64)  # the loss itself is a few bytes more


SMALL = ["model.unet.channel_mult=[1]", "model.unet.attention_resolutions=[16]"]
MEASURED = {
    "prior in float32": ("prior/synthetic.yaml", ["model.depth=1"], "float32"),
    "adapters of a prior": ("prior/emoji_lora.yaml", [], "float32"),
    "frozen half of a decoder": ("decoder/synthetic_64.yaml", [*SMALL, "train.freeze=['unet.down.*']"], "float32"),
    "decoder in bfloat16": ("decoder/synthetic_64.yaml", SMALL, "bfloat16"),
    "checkpointed upsampler": (
        "upsampler/synthetic_64_to_256.yaml",
        ["model.unet.checkpoint_activations=true"],
        "float32",
    ),
    "two networks that are told of noise": (
        "upsampler/synthetic_64_to_256.yaml",
        ["model.last_step_network=true", "model.steps=2", "model.noise_augmentation=100"],
        "float32",
    ),
}


@pytest.mark.parametrize("case", MEASURED)
def test_planned_memory_is_what_a_step_needs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 15 %, gradients included, by the allocator's own records of the same step on real tensors. FLOPs are those
    of PyTorch's counter. A plan is of any device, and so without what a CPU alone leaves out."""
    monkeypatch.setattr("unclip.nn.sparing._is_plain", lambda *_: False)
    file, overrides, precision = MEASURED[case]
    recipe = read_recipe(CONFIGS / file, overrides)
    low, batch = precision == "bfloat16", 8
    with planning_tensors():
        workload = open_workload(recipe)
        planned = trace_step(workload.network, workload.run, batch, bfloat16=low, gpu=False)
    real = open_workload(recipe)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = real.run(batch, lambda: None)
        loss.backward()

    with FlopCounterMode(display=False) as counter:
        step()  # whatever is allocated once is so now
    real.network.zero_grad(set_to_none=True)
    assert planned.peak(1.0) == pytest.approx(measured_peak(step), rel=0.15)
    assert planned.flops.total == counter.get_total_flops()
    learning = sum(p.numel() for p in workload.network.parameters() if p.requires_grad)
    assert learning == sum(p.numel() for p in real.network.parameters() if p.requires_grad)
    assert planned.flops.frozen > 0 or recipe.stage == "upsampler"


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch built for GPUs, with autocast for them")
def test_gpu_rules_are_cudas_autocast() -> None:
    """What a U-Net with dropout saves, counted under CUDA's own autocast rules, needs no device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def saved(device: str) -> int:
        seen: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[id(tensor.untyped_storage())] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with FakeTensorMode(), torch.device(device):
            network = Denoiser(dropout=0.1)
            for parameter in network.parameters():
                pack(parameter)
            weights = sum(size for size, _ in seen.values())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                network(torch.randn(4, 3, 8, 8)).square().mean()
            return sum(size for size, _ in seen.values()) - weights

    figures = {}
    for device in ("cuda", "cpu"):
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            if device == "cpu":
                plain = saved(device)
                with GpuRules():
                    figures[device] = saved(device)
            else:
                figures[device] = saved(device)
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])
            torch.clear_autocast_cache()
    assert figures["cpu"] == figures["cuda"]
    assert plain != figures["cuda"]  # the rules matter
