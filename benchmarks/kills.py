"""A run that is killed over and over, beside one that is left alone: the weights at the end must be the same bits.

`python -m benchmarks kills --kills 20` trains a small upsampler on drawn shapes under the `deepspeed` launcher with two
processes, sends SIGKILL to one of them or to all at random moments, starts the same line again each time, and compares
the model folders. It ends with code 1 where they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
UNET = {"image_size": 16, "model_channels": 8, "channel_mult": [1, 2], "head_channels": 8, "dropout": 0.1}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--zero", type=int, default=1, choices=range(4))
    parser.add_argument("--plain", action="store_true", help="without the launcher, imports made once: quicker")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--port", type=int, default=29711)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="an empty or new folder")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        sys.exit(f"{options.out} is not empty")
    recipe = options.out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(options)))
    rng = random.Random(options.seed)
    _SERVER.set_forkserver_preload(["deepspeed", "unclip.training", "upsamplers.train"])

    started = time.perf_counter()
    whole = _Launch(recipe, options.out / "whole", options)
    whole.wait()
    left_alone = time.perf_counter() - started
    moments = []
    cut = options.out / "cut"
    while len(moments) < options.kills:
        # Some are hit as they start, the others up to so many steps on that the last one still finds the run going;
        # then at a random time, so in a step, in writing a line of metrics or a checkpoint.
        ahead = rng.randint(0, max(options.steps // options.kills - 1, 0))
        launch = _Launch(recipe, cut, options)
        if ahead:
            launch.wait_for_step(cut, _step(cut) + ahead)
        if launch.wait(rng.uniform(0, 0.5 if ahead else 20)):
            break
        one = rng.random() < 0.5
        killed = launch.kill(rng, one)
        moments.append({"step": _step(cut), "killed": "one" if one else "all", "processes": killed})
        print(f"kill {len(moments)}: after step {_step(cut)}, {moments[-1]['killed']} of {killed}", flush=True)
    if not (cut / "model").exists():
        _Launch(recipe, cut, options).wait()
    same = all(
        (options.out / "whole" / "model" / file).read_bytes() == (cut / "model" / file).read_bytes()
        for file in ("config.json", "model.safetensors")
    ) and _losses(options.out / "whole") == _losses(cut)
    result = {"kills": len(moments), "equal": same, "left_alone_s": round(left_alone, 1), "moments": moments}
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"{len(moments)} kills; weights and losses {'are equal, bit for bit' if same else 'DIFFER'}")
    if not same or len(moments) < options.kills:
        sys.exit(1)


class _Launch:
    """One start of the run under the launcher."""

    def __init__(self, recipe: Path, run_dir: Path, options: argparse.Namespace) -> None:
        self.log = (recipe.parent / "log.txt").open("a")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        script = ["train_upsampler.py", "--config", str(recipe.resolve()), f"train.run_dir={run_dir.resolve()}"]
        self.plain = options.plain
        self.processes: list[Any] = []
        if options.plain:
            environment |= {"WORLD_SIZE": str(options.processes), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(options.port)}
            for rank in range(options.processes):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(_SERVER.Process(target=_work, args=(script, own, self.log.name)))
                self.processes[-1].start()
            return
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--num_gpus", str(options.processes), "--master_port", str(options.port), *script]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.processes.append(process)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended well within that time."""
        if not self._end_by_themselves(seconds):
            return False
        codes = [_code(process) for process in self.processes]
        if any(codes):
            sys.exit(f"the run ended with codes {codes}; see {self.log.name}")
        return True

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Until the run has told of that step, or has ended."""
        while _step(run_dir) < step and _code(self.processes[0]) is None:
            time.sleep(0.02)

    def kill(self, rng: random.Random, one: bool) -> int:
        """SIGKILL to one training process, whose end the launcher, or the others, answer; or to everything."""
        workers = [p.pid for p in self.processes] if self.plain else _workers(self.processes[0].pid)
        if one and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            if self.plain and not self._end_by_themselves(60):
                self._kill_all()  # they had not met yet, and wait for each other; a launcher would end them
        else:
            self._kill_all()
        self._end_by_themselves(None)
        time.sleep(1)  # until the port is free
        return len(workers)

    def _end_by_themselves(self, seconds: float | None) -> bool:
        end = float("inf") if seconds is None else time.monotonic() + seconds
        while any(_code(process) is None for process in self.processes):
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        return True

    def _kill_all(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if self.plain:
                    os.kill(process.pid, signal.SIGKILL)
                else:
                    os.killpg(process.pid, signal.SIGKILL)


_SERVER = multiprocessing.get_context("forkserver")


def _work(script: list[str], environment: dict[str, str], log: str) -> None:
    """A training process that has its imports from the server it was forked of."""
    with open(log, "a", buffering=1) as out:  # noqa: PTH123
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")


def _code(process: Any) -> int | None:
    """Exit code of a process of either kind, None while it runs."""
    return process.exitcode if isinstance(process, multiprocessing.process.BaseProcess) else process.poll()


def _workers(group: int) -> list[int]:
    """Training processes of a launch, by its process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            own = os.getpgid(int(folder.name)) == group
        except OSError:
            continue
        if own and b"train_upsampler.py" in command and any(word.startswith(b"--local_rank") for word in command):
            found.append(int(folder.name))
    return found


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    train: dict[str, Any] = {"steps": options.steps, "batch_size": 8, "log_every": 1, "checkpoint_every": 5}
    train |= {"zero_stage": options.zero, "peak_tflops": 1.0, "wandb": {"mode": "disabled"}, "ema_decay": 0.99}
    train |= {"optimizer": {"lr": 1e-3, "schedule": "cosine"}}
    return {
        "model": {"unet": UNET, "low_size": 8, "high_size": 16, "steps": 2},
        "data": {"source": "synthetic", "image_size": 16, "synthetic": {"size": 500}},
        "train": train,
    }


def _step(run_dir: Path) -> int:
    """The last step that the metrics tell of."""
    return max((int(row["step"]) for row in _rows(run_dir)), default=0)


def _losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in _rows(run_dir)]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    file = run_dir / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut by the kill
            continue
    return rows
