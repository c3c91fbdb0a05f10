"""What a training run puts on which device, and which gradients there are; shown on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers_training import BATCH, STEPS, Numbers, Tiny, TinyRun, loss_of
from PIL import Image
from torch import Tensor, nn

from unclip.config import parse_config
from unclip.training import current, fit
from unclip.training.clip import bounded
from unclip.training.step import random_state


class Moving(Tiny):
    """Tells which copy of it is sent where."""

    moves: ClassVar[list[tuple[int, str]]] = []

    def to(self, *arguments: Any, **options: Any) -> Any:
        Moving.moves.append((id(self), str(arguments[0])))
        return super().to(*arguments, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_what_draws_on_the_way_is_on_the_runs_device_while_it_draws(tmp_path: Path, fails: bool) -> None:
    Moving.moves.clear()
    body = {"run_dir": str(tmp_path), "steps": STEPS, "batch_size": BATCH, "sample_every": STEPS, "peak_tflops": 1.0}
    config = parse_config(TinyRun, {"train": {**body, "wandb": {"mode": "disabled"}}})
    seen: list[tuple[int, list[str]]] = []

    def sample(network: nn.Module) -> Image.Image:
        assert not network.training
        seen.append((id(network), [where for who, where in Moving.moves if who == id(network)]))
        if fails:
            raise ValueError("no picture today")
        return Image.new("RGB", (8, 8))

    def begin() -> None:
        fit(
            Moving(), loss_of, Numbers(BATCH, 0, 1), config.train, run_config=config, sample=sample,  # type: ignore[arg-type]
            export=lambda _state, _folder: None,
        )  # fmt: skip

    if fails:
        with pytest.raises(ValueError, match="no picture today"):
            begin()
    else:
        begin()
    copied, before = seen[0]
    assert before == [str(current().device)], "the copy that draws was not moved"
    assert [where for who, where in Moving.moves if who == copied] == [*before, "cpu"], "or not taken back"


def test_a_run_that_draws_nothing_keeps_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    copied: list[type] = []
    whole = copy.deepcopy

    def spy(value: Any, *arguments: Any) -> Any:
        copied.append(type(value))
        return whole(value, *arguments)

    monkeypatch.setattr("unclip.training.loop.copy.deepcopy", spy)
    body = {"run_dir": str(tmp_path), "steps": 1, "batch_size": BATCH, "peak_tflops": 1.0, "sample_every": 0}
    config = parse_config(TinyRun, {"train": {**body, "wandb": {"mode": "disabled"}}})
    fit(
        Tiny(), loss_of, Numbers(BATCH, 0, 1), config.train, run_config=config,  # type: ignore[arg-type]
        sample=lambda _network: Image.new("RGB", (8, 8)), export=lambda _state, _folder: None,
    )  # fmt: skip
    assert Tiny not in copied


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("asked_of_a_gpu", [False, True])
def test_the_network_computes_in_the_runs_precision(
    precision: str, asked_of_a_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's engine asks whether autocast is on without naming a device, which means a GPU, and where it is turns
    it off around the network. Here that question is answered as on a GPU.
    """
    if asked_of_a_gpu:
        enabled = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: enabled(*(device or ("cpu",))))
    seen = set()

    class Telling(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            seen.add(self.inner[0](x).dtype)
            return result

    body = {"run_dir": str(tmp_path), "steps": 1, "batch_size": BATCH, "peak_tflops": 1.0, "sample_every": 0}
    body |= {"precision": precision, "wandb": {"mode": "disabled"}}
    config = parse_config(TinyRun, {"train": body})
    fit(
        Telling(), loss_of, Numbers(BATCH, 0, 1), config.train, run_config=config,  # type: ignore[arg-type]
        export=lambda _state, _folder: None,
    )  # fmt: skip
    assert seen == {getattr(torch, precision)}


def test_a_run_goes_on_on_another_kind_of_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU's generator has 16 bytes of state where a CPU's has 5,056."""
    body = {"run_dir": str(tmp_path), "steps": 2, "batch_size": BATCH, "peak_tflops": 1.0, "checkpoint_every": 1}

    def run(steps: int) -> None:
        config = parse_config(TinyRun, {"train": {**body, "steps": steps, "wandb": {"mode": "disabled"}}})
        fit(
            Tiny(), loss_of, Numbers(BATCH, 0, 1), config.train, run_config=config,  # type: ignore[arg-type]
            export=lambda _state, _folder: None,
        )  # fmt: skip

    def as_on_a_gpu(generator: torch.Generator) -> dict[str, Any]:
        return {**random_state(generator), "generator": torch.zeros(16, dtype=torch.uint8)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip.training.loop.random_state", as_on_a_gpu)
        run(1)
    assert "another kind" not in "".join(capsys.readouterr())
    run(2)
    said = "".join(capsys.readouterr())
    assert "the checkpoint is of another kind of device: other noise from here on" in said
    assert f"continuing {tmp_path} from step 1" in said


def test_the_bound_of_clips_scale_has_a_gradient() -> None:
    for value in (20.0, 100.0, 150.0):
        scale = torch.tensor([value], requires_grad=True)
        found = bounded(scale)
        found.sum().backward()
        assert found.tolist() == [min(value, 100.0)]
        assert scale.grad is not None and scale.grad.tolist() == [1.0]
