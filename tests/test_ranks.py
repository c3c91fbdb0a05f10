"""What several processes do together: ZeRO 0 to 3, the moving average, resuming, and what ends a run on all of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import RATE, STEPS, Tiny, difference, launch, loss_of, losses, rows, stop_at, train
from torch import Tensor, nn

from unclip.errors import UnclipError
from unclip.training.checkpoint import checkpoints, files_of
from unclip.training.engine import learning_rate_factor
from unclip.training.state import Shards

PARAMETERS = sum(p.numel() for p in Tiny().parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process stops runs of each stage after step 3; two go on with them, and do all else of `stages`."""
    folder = tmp_path_factory.mktemp("stages")
    alone = train(folder / "alone")
    for stage in range(4):
        number = signal.SIGINT if stage == 0 else signal.SIGTERM
        sentence = f"stopped by {number.name} after step 3, which .*step-00000003 keeps; enter the same line"
        with pytest.raises(UnclipError, match=sentence) as stopped:
            train(folder / f"one-{stage}", zero_stage=stage, before=stop_at(3, 0, number))
        assert stopped.value.exit_code == 128 + number
    told = run(2, "stages", folder)
    # The other way: one process goes on with what two have written, at another stage.
    back = []
    for stage in range(4):
        here = folder / f"plain-{stage}"
        for name in ("checkpoints/step-00000006", "model"):
            (here / name).rename(here / f"put-away-{name.replace('/', '-')}")
        back.append(difference(alone, train(here, zero_stage=(stage + 2) % 4)))
    return {**told, "folder": folder, "alone": losses(folder / "alone"), "back": back}


def run(world_size: int, task: str, folder: Path) -> dict[str, Any]:
    done = launch(world_size, task, folder)
    assert [code for code, _ in done] == [0] * world_size, "\n".join(output for _, output in done)
    return json.loads((folder / "told-0.json").read_text())  # type: ignore[no-any-return]


def test_training_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """No word of a launcher for child processes to believe, and torch's own linear layer."""
    linear, environment = torch.nn.functional.linear, dict(os.environ)
    inside: list[bool] = []
    train(
        tmp_path / "run",
        zero_stage=3,
        before=lambda _step: inside.append("WORLD_SIZE" in os.environ and torch.nn.functional.linear is not linear),
    )
    assert all(inside) and inside  # without a change there would be nothing to take back
    assert torch.nn.functional.linear is linear
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ.get(name) for name in names] == [environment.get(name) for name in names]


def test_every_stage_has_the_curve_of_a_plain_loop(told: dict[str, Any], tmp_path: Path) -> None:
    """AdamW of torch on whole batches, with the schedule, clipping and weight decay of the configuration."""
    torch.manual_seed(3)
    network = Tiny()
    groups = [[p for p in network.parameters() if p.requires_grad and (p.ndim > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=RATE
    )
    from unclip.config import OptimizerConfig

    options = OptimizerConfig(lr=RATE, schedule="cosine")
    plain, position = [], 0
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate_factor(options, step, STEPS)
        x = torch.stack([torch.randn(7, generator=torch.Generator().manual_seed(position + i)) for i in range(8)])
        position += 8
        loss = loss_of(network, {"image": x}, torch.Generator())["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g], 0.5)
        optimizer.step()
        plain.append(float(loss))
    assert told["alone"] == pytest.approx(plain, rel=1e-5)
    for curve in told["curves"]:
        assert curve == pytest.approx(plain, rel=1e-5)  # 1e-3 is asked for


def test_the_average_is_cut_in_parts_and_right(told: dict[str, Any]) -> None:
    assert max(told["ema"]) < 1e-6
    assert max(told["held"]) <= PARAMETERS // 2 + len(list(Tiny().parameters()))  # a process's half


def test_a_signal_to_one_process_stops_all_and_nothing_is_lost(told: dict[str, Any]) -> None:
    for code, sentence, quiet in told["stopped"]:
        assert code == 143 and "stopped by SIGTERM after step 3" in sentence and quiet is False
    assert told["resumed"] == [[0.0, True]] * 4  # weights and metrics, bit for bit, with dropout and noise


def test_other_processes_and_stages_go_on(told: dict[str, Any]) -> None:
    """From one process to two and from two to one, from each stage to another."""
    for gap, curve in told["moved"]:
        assert gap < 1e-6 and curve == pytest.approx(told["alone"], rel=1e-5)
    assert max(told["back"]) < 1e-6


def test_pieces_of_a_checkpoint_cover_each_parameter_once(told: dict[str, Any]) -> None:
    for stage in range(4):
        newest = checkpoints(told["folder"] / f"cut-{stage}" / "checkpoints")[-1]
        shards = Shards(files_of(newest), 0)
        for name, parameter in Tiny().named_parameters():
            assert len(shards.read(name, 0, parameter.numel(), "parameters")) == parameter.numel()
            if parameter.requires_grad:
                for key in ("exp_avg", "exp_avg_sq"):
                    assert shards.read(name, 1, parameter.numel() - 1, "moments", key).isfinite().all()
        with pytest.raises(UnclipError, match=r"holds 65 of 66 elements of outer.weight \(ema\)"):
            shards.read("outer.weight", 0, 66, "ema")


def test_offloading_changes_nothing(told: dict[str, Any]) -> None:
    assert max(told["offloaded"]) < 1e-6


def test_validation_is_of_the_average_and_leaves_no_trace(told: dict[str, Any]) -> None:
    """The runs that were stopped and resumed had it, and came out alike; it falls as the model learns."""
    assert len(told["validated"]) == 3 and told["validated"][2] < told["validated"][0]


# ---- what ends a run, or does not ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("guards")
    told = run(2, "guards", folder)
    assert told.keys() == json.loads((folder / "told-1.json").read_text()).keys()
    return {**told, "folder": folder}


def test_an_infinite_loss_of_one_process_skips_the_step_on_all(guarded: dict[str, Any]) -> None:
    assert guarded["skipped"] == [[0, 0, 1, 1, 1, 1]] * 4
    for state in guarded["after"]:
        for name, values in state.items():
            assert torch.tensor(values).isfinite().all()
            assert values == pytest.approx(guarded["after"][0][name], abs=1e-6)


def test_too_many_skipped_steps_end_the_run(guarded: dict[str, Any]) -> None:
    assert guarded["nan"].startswith("3 steps in a row up to step 5 had no finite loss or gradient; the checkpoint ")
    assert "Lower train.optimizer.lr" in guarded["nan"]
    # Of steps 2 and 4, the one from before the first bad step is there still.
    assert "step-00000002" in [p.name for p in checkpoints(guarded["folder"] / "nan" / "checkpoints")]


def test_processes_that_drift_apart_are_noticed(guarded: dict[str, Any]) -> None:
    """One bit of one weight."""
    assert "at step 3 the weights of process 1 are not those of process 0" in guarded["drift"]
    assert "step-00000002 is from before" in guarded["drift"]


def test_a_full_disk_of_one_process_ends_all(guarded: dict[str, Any]) -> None:
    assert "the checkpoint of step 4 in " in guarded["full"] and "No space left on device" in guarded["full"]
    assert guarded["full"].endswith("step-00000002 stays. Mend that and enter the same line again")
    assert guarded["left"] == ["step-00000002"]


def test_a_damaged_part_sends_all_to_the_checkpoint_before(guarded: dict[str, Any]) -> None:
    assert guarded["mended"] == 0.0


def test_compiling_keeps_names_and_values(guarded: dict[str, Any]) -> None:
    same_names, gap, graphs = guarded["compiled"]
    assert same_names and gap < 1e-6 and graphs > 0


# ---- kills -------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], processes: list[Any]) -> None:
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def test_a_run_that_is_killed_twice_ends_as_if_it_had_not_been(told: dict[str, Any], tmp_path: Path) -> None:
    """First one process of two, then both while they write; the other one notices, and says one sentence."""
    whole, cut = told["folder"], tmp_path
    kept = cut / "slow" / "checkpoints"

    def one(processes: list[Any]) -> None:
        until(lambda: len(checkpoints(kept)) > 1, processes)
        processes[1].send_signal(signal.SIGKILL)

    (first, output), (second, _) = launch(2, "slow", cut, "0.01", kill=one)
    assert (first, second) == (1, -signal.SIGKILL), output
    sentences = [line for line in output.splitlines() if line.startswith("helpers_training.py: ")]
    assert len(sentences) == 1 and "process 0 of 2 lost another one after step" in sentences[0], output
    assert "enter the same line again" in sentences[0] and "Traceback" not in output

    def both(processes: list[Any]) -> None:
        seen = len(rows(cut / "slow"))
        until(lambda: any(kept.glob(".tmp-*")) and len(rows(cut / "slow")) > seen, processes)
        for process in processes:
            process.send_signal(signal.SIGKILL)

    assert [code for code, _ in launch(2, "slow", cut, "0.01", kill=both)] == [-signal.SIGKILL] * 2
    assert [code for code, _ in launch(2, "slow", cut, "0")] == [0, 0]
    states: list[dict[str, Tensor]] = [
        torch.load(folder / "slow" / "model" / "state.pt", weights_only=True) for folder in (whole, cut)
    ]
    assert difference(*states) == 0.0
    assert losses(whole / "slow") == losses(cut / "slow") and len(losses(cut / "slow")) == 24
    assert not list(cut.rglob(".tmp-*"))


def test_a_process_that_waits_too_long_says_so(tmp_path: Path) -> None:
    def stop(processes: list[Any]) -> None:
        until(lambda: bool(checkpoints(tmp_path / "slow" / "checkpoints")), processes)
        processes[1].send_signal(signal.SIGSTOP)
        processes[0].wait()
        processes[1].send_signal(signal.SIGKILL)

    (code, output), _ = launch(2, "slow", tmp_path, "0.01", "0.05", kill=stop)
    assert code == 1 and "process 0 of 2 waited 0.05 minutes (train.guard.timeout_minutes)" in output
