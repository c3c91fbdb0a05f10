"""A small network, numbers for it and the loop around them; run as a script by several processes (test_ranks.py)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unclip.config import Config, DataConfig, TrainConfig, parse_config
from unclip.data import Tally
from unclip.errors import UnclipError
from unclip.training.ema import EMA
from unclip.training.partition import gather, local_part, numel_of, shape_of

STEPS, BATCH = 6, 8
RATE = 1e-2
HELD_OUT = {"source": "synthetic", "image_size": 8, "synthetic": {"size": 64}, "holdout": 0.5}


class TinyRun(Config):
    """What `fit` records of a run."""

    model: Config = Config()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


class Tiny(nn.Module):
    """Sizes that no number of processes divides, a frozen parameter and a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(13))
        self.outer = nn.Linear(13, 5)
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 5), requires_grad=False)
        self.register_buffer("seen", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)) + self.frozen  # type: ignore[no-any-return]


class Numbers:
    """Endless samples, the same whatever the number of processes; may do something before a micro-batch."""

    def __init__(self, size: int, rank: int, world_size: int, before: Callable[[int], None] | None = None) -> None:
        self.size, self.rank, self.world_size, self.before = size, rank, world_size, before
        self.position = 0
        self.tally = Tally()

    def __next__(self) -> dict[str, Any]:
        if self.before is not None:
            self.before(self.position // BATCH + 1)  # the step
        first = self.position + self.rank * self.size
        self.position += self.size * self.world_size
        rows = [torch.randn(7, generator=torch.Generator().manual_seed(first + i)) for i in range(self.size)]
        return {"image": torch.stack(rows), "caption": [""] * self.size}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        """The states of all processes that wrote; here they are alike."""
        self.position = (state[0] if isinstance(state, list) else state)["position"]


def loss_of(network: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Deterministic without dropout; with noise from the generator, which must be resumed, in a second term."""
    x = batch["image"].flatten(1)[:, :7]  # also of pictures, which validation reads
    target = torch.stack([x[:, :5].sin(), x[:, 1:6].cos()]).sum(0)
    noise = torch.randn(len(x), generator=generator)
    loss = (network(x) - target).square().mean(1)
    return {"loss": loss, "noise": noise}


def train(
    folder: Path,
    *,
    dropout: float = 0.0,
    before: Callable[[int], None] | None = None,
    loss_fn: Callable[..., dict[str, Tensor]] = loss_of,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """A run of STEPS steps, or what is left of it -> the exported state."""
    from unclip.training import current, fit
    from unclip.training.engine import micro_batch_size

    body: dict[str, Any] = {"run_dir": str(folder), "steps": STEPS, "batch_size": BATCH, "accumulation": 2}
    body |= {"ema_decay": 0.8, "log_every": 1, "checkpoint_every": 2, "peak_tflops": 1.0, "wandb": {"mode": "disabled"}}
    body |= {"optimizer": {"lr": RATE, "schedule": "cosine", "weight_decay": 0.1, "grad_clip": 0.5}, **options}
    config = parse_config(TinyRun, {"train": body, "data": data or {}})
    here = current()
    torch.manual_seed(3)
    network = Tiny(dropout)
    batches = Numbers(micro_batch_size(config.train, here), here.rank, here.world_size, before)

    def export(state: dict[str, Tensor], place: Path) -> None:
        place.mkdir(exist_ok=True)
        torch.save(state, place / "state.pt")

    fit(network, loss_fn, batches, config.train, run_config=config, export=export)  # type: ignore[arg-type]
    if here.world_size > 1:
        torch.distributed.barrier()
    return torch.load(folder / "model" / "state.pt", weights_only=True)  # type: ignore[no-any-return]


def refused_before_loading(stage: str, *arguments: str) -> str:
    """What train_STAGE.py says on stderr of a line that it refuses, having loaded nothing heavy: of eight processes
    each would load PyTorch and the libraries of data and models, only to end.
    """
    script = f"train_{stage}.py"
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[script, *arguments]!r}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, *sorted(set(sys.modules) & {'torch', 'datasets', 'deepspeed'}))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "2\n", done.stderr
    return done.stderr


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_at(step: int, rank: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """A signal to one process alone, once, while it makes that step."""
    sent: list[int] = []

    def before(now: int) -> None:
        if now == step and not sent and int(os.environ.get("RANK", 0)) == rank:
            sent.append(number)
            os.kill(os.getpid(), number)

    return before


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ---- several processes -------------------------------------------------------------------------------------


def launch(
    world_size: int, task: str, folder: Path, *arguments: str, kill: Callable[[list[Any]], None] | None = None
) -> list[tuple[int, str]]:
    """Start this file as `world_size` processes -> exit code and output of each."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]), "PYTHONWARNINGS": "ignore"}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, task, str(folder), *arguments],
                env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root,
            )
        )  # fmt: skip
    if kill is not None:
        kill(processes)
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


class _Reference(EMA):
    """Beside the average of parts, that of whole parameters in float64."""

    whole: dict[str, Tensor]

    def _now(self) -> dict[str, Tensor]:
        return {
            name: gather(local_part(p, self.rank, self.world_size), numel_of(p), self.world_size).double().clone()
            for name, p in self.parameters.items()
        }

    def update(self) -> None:
        if not self.updates:
            self.whole = {name: value.clone() for name, value in self.started.items()}
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        super().update()
        for name, value in self._now().items():
            self.whole[name] = decay * self.whole[name] + (1 - decay) * value

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.started = self._now()
        _Reference.latest = self

    latest: Any = None


def stages(folder: Path) -> dict[str, Any]:
    """Every ZeRO stage: its curve, its average against the reference, stopped and resumed, begun by one process."""
    from unclip.training import loop

    told: dict[str, Any] = {"curves": [], "ema": [], "resumed": [], "moved": [], "stopped": [], "held": []}
    patch = pytest.MonkeyPatch()
    for stage in range(4):
        patch.setattr(loop, "EMA", _Reference)
        plain = train(folder / f"plain-{stage}", zero_stage=stage)
        patch.undo()
        told["curves"].append(losses(folder / f"plain-{stage}"))
        reference = _Reference.latest
        expected = {name: value.view(shape_of(reference.parameters[name])) for name, value in reference.whole.items()}
        told["ema"].append(max(float((plain[name].double() - v).abs().max()) for name, v in expected.items()))
        told["held"].append(sum(part.numel() for part in reference.shadow.values()))
        options = {"zero_stage": stage, "dropout": 0.3, "validate_every": 2, "validate_batches": 2, "data": HELD_OUT}
        whole = train(folder / f"whole-{stage}", **options)
        try:
            train(folder / f"cut-{stage}", **options, before=stop_at(3, rank=1))
        except UnclipError as error:
            told["stopped"].append((error.exit_code, str(error), getattr(error, "quiet", None)))
        again = train(folder / f"cut-{stage}", **options)
        same = rows_without_speed(folder / f"whole-{stage}") == rows_without_speed(folder / f"cut-{stage}")
        told["resumed"].append((difference(whole, again), same))
        # A checkpoint that one process wrote, at another stage.
        moved = train(folder / f"one-{(stage + 1) % 4}", zero_stage=stage)
        told["moved"].append((difference(plain, moved), losses(folder / f"one-{(stage + 1) % 4}")))
    told["offloaded"] = [
        difference(
            train(folder / f"plain-{stage}-again", zero_stage=stage),
            train(folder / f"offloaded-{stage}", zero_stage=stage, offload=offload),
        )
        for stage, offload in ((1, {"optimizer": "cpu"}), (3, {"optimizer": "cpu", "parameters": "cpu"}))
    ]
    told["validated"] = [row["validation_loss"] for row in rows(folder / "whole-3") if "validation_loss" in row]
    slow(folder, "0")
    return told


def guards(folder: Path) -> dict[str, Any]:
    """What goes wrong on one process ends, or is skipped, on all."""
    from unclip.training import checkpoint

    rank = int(os.environ["RANK"])
    told: dict[str, Any] = {"skipped": [], "after": []}

    def failing(steps: set[int], value: float) -> Callable[..., dict[str, Tensor]]:
        calls = iter(range(100))

        def loss_fn(network: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
            answer = loss_of(network, batch, generator)
            if next(calls) // 2 + 1 in steps and rank == 1:
                answer["loss"] = answer["loss"] + value  # an infinite loss, whose gradient is finite
            return answer

        return loss_fn

    def ended(name: str, **options: Any) -> None:
        try:
            train(folder / name, **options)
            told[name] = "no error"
        except UnclipError as error:
            told[name] = str(error)

    for stage in range(4):
        state = train(folder / f"skip-{stage}", zero_stage=stage, loss_fn=failing({3}, torch.inf))
        told["skipped"].append([row["skipped_steps"] for row in rows(folder / f"skip-{stage}")])
        told["after"].append({name: value.flatten().tolist() for name, value in state.items()})
    ended("nan", zero_stage=2, loss_fn=failing({3, 4, 5}, torch.nan), guard={"max_skipped": 3})

    def drift(network: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        if rank == 1 and batch["image"][0, 0] == third[0, 0]:
            bias = network.module.outer.bias.data
            bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
        return loss_of(network, batch, generator)

    source = Numbers(2, 1, 2)
    third = [next(source)["image"] for _ in range(5)][4]  # of process 1 in step 3
    ended("drift", loss_fn=drift, guard={"compare_every": 1}, checkpoint_every=2)

    written = checkpoint._write

    def full(file: Path, fill: Any) -> dict[str, Any]:
        if "00000004" in str(file) and rank == 1:
            written(file, lambda out: out.write(b"x" * 1000))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(file, fill)

    checkpoint._write = full
    ended("full", zero_stage=1)
    checkpoint._write = written
    told["left"] = sorted(path.name for path in (folder / "full" / "checkpoints").iterdir())
    whole = train(folder / "undamaged", zero_stage=1, keep_every=2)
    torch.distributed.barrier()
    if rank == 0:
        (folder / "undamaged" / "model" / "state.pt").unlink()
        file = folder / "undamaged" / "checkpoints" / "step-00000006" / "rank-1.pt"
        body = bytearray(file.read_bytes())
        body[len(body) // 2] ^= 1
        file.write_bytes(body)
        shutil.rmtree(folder / "undamaged" / "checkpoints" / "step-00000004")
    torch.distributed.barrier()
    told["mended"] = difference(whole, train(folder / "undamaged", zero_stage=1))
    told["compiled"] = compiled(folder)
    return told


def compiled(folder: Path) -> list[Any]:
    """`train.compile` under the backend that traces and runs as before, which takes no compiler."""
    import deepspeed.runtime.engine as ds

    patch = pytest.MonkeyPatch()
    whole = ds.DeepSpeedEngine.compile
    patch.setattr(ds.DeepSpeedEngine, "compile", lambda engine: whole(engine, backend="eager"))
    states = [train(folder / f"compiled-{on}", compile=on, steps=2) for on in (False, True)]
    patch.undo()
    traced = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return [list(states[0]) == list(states[1]), difference(*states), traced]


def rows_without_speed(folder: Path) -> list[dict[str, Any]]:
    from unclip.runs import MEASURED

    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows(folder)]


def slow(folder: Path, pause: str, minutes: str = "0.5") -> dict[str, Any]:
    """A run to be killed."""

    def before(step: int) -> None:
        time.sleep(float(pause))

    guard = {"timeout_minutes": float(minutes)}
    train(folder / "slow", zero_stage=1, dropout=0.3, before=before, steps=24, guard=guard)
    return {}


def main() -> None:
    """Do a task and write what is to be told of it, one file a process."""
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "slow":
        from unclip.training import main_for

        recipe = folder / "recipe.yaml"
        if os.environ["RANK"] == "0":
            recipe.write_text("{}")
        while not recipe.is_file():
            time.sleep(0.01)
        main_for(TinyRun, lambda *_: slow(folder, *sys.argv[3:]), "", ["--config", str(recipe)])
        return
    told = {"stages": stages, "guards": guards}[task](folder)
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))
    with contextlib.suppress(RuntimeError):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
