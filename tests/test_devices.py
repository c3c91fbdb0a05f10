"""What a training run puts on which device, and which gradients there are; shown on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers_training import BATCH, STEPS, Numbers, Tiny, TinyRun, loss_of
from PIL import Image
from torch import nn

from unclip.config import parse_config
from unclip.training import current, fit
from unclip.training.clip import bounded


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


def test_the_bound_of_clips_scale_has_a_gradient() -> None:
    for value in (20.0, 100.0, 150.0):
        scale = torch.tensor([value], requires_grad=True)
        found = bounded(scale)
        found.sum().backward()
        assert found.tolist() == [min(value, 100.0)]
        assert scale.grad is not None and scale.grad.tolist() == [1.0]
