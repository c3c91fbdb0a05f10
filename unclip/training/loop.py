"""One training loop for every stage. A stage gives it a network, a loss function and batches, never a subclass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from unclip.config import Config, TrainConfig
from unclip.data import Batches, Tally
from unclip.errors import UnclipError
from unclip.training.checkpoint import files_of, find_checkpoint, save_checkpoint
from unclip.training.distributed import Distributed, current, told_once
from unclip.training.ema import EMA
from unclip.training.engine import process_kept, set_schedule, start_engine
from unclip.training.guard import Signals, Skips, Stopped, compare_weights, lost_process
from unclip.training.metrics import Window, parameter_norm
from unclip.training.rundir import open_run
from unclip.training.settings import settle
from unclip.training.state import Shards, capture, restore
from unclip.training.step import LossFunction, Step, begin_random_state, random_state, restore_random_state, same_kind
from unclip.training.tracking import Tracker, stage_of
from unclip.training.validation import Validation

Export = Callable[[dict[str, Tensor], Path], Path | None]  # where it wrote, if not to the folder given
Sample = Callable[[nn.Module], Image.Image]
Diagnose = Callable[[nn.Module], dict[str, float]]


@process_kept()
def fit(
    network: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    config: TrainConfig,
    *,
    run_config: Config,
    export: Export,
    sample: Sample | None = None,
    diagnose: Diagnose | None = None,
) -> Path:
    """Train to `config.steps`, continuing from the newest checkpoint in `run_dir`, and write the EMA model to
    `run_dir/model`.

    `loss_fn(network, batch, generator)` returns per-sample losses (B,) by name; `loss` is minimised. `batch["image"]`
    is on the device. `export(ema_state, folder)` writes a model folder; `sample(ema_network)` draws a grid for
    `run_dir/samples`, `diagnose(ema_network)` measures more than a loss tells; both every `sample_every` steps.
    Returns the model folder. Raises UnclipError: the run folder cannot be written, or holds a run of another model;
    a signal, which is answered by a checkpoint; losses or processes that fail (unclip.training.guard).
    """
    distributed = current()
    config = settle(config, distributed.world_size)
    open_run(Path(config.run_dir), run_config, config, distributed)
    shown = bool(config.sample_every) and (sample or diagnose) is not None and distributed.is_main
    preview = copy.deepcopy(network) if shown else None  # while it is on the CPU still, and so takes no device's memory
    data = getattr(run_config, "data", None)
    validation = Validation(data, config, distributed) if config.validate_every and data is not None else None
    run = _Run(network, loss_fn, batches, config, distributed)
    try:
        with Signals() as signals:
            run.resume()
            with run.track(run_config) as tracker:
                run.train(signals, validation, lambda: _draw(run, preview, sample, diagnose))
                state = run.ema.state_dict_full(keep=distributed.is_main)
                written: Path | None = None
                if distributed.is_main:
                    written = export(state, run.folder / "model")
                tallies = distributed.gather(batches.tally.state_dict())
                tracker.say(Tally.sum(tallies).report())
                tracker.say(f"trained to step {run.step}; the model is in {written or run.folder / 'model'}")
    except OSError as error:
        named = f" ({error.filename})" if error.filename else ""
        raise UnclipError(
            f"the run in {run.folder} ended after step {run.step}: {error.strerror or error}{named}. Mend that and "
            "enter the same line again"
        ) from error
    except RuntimeError as error:
        ended = lost_process(error, config, run.step, distributed)
        if ended is None:
            raise
        raise ended from error
    return run.folder / "model"


class _Run:
    """What a run consists of, and its steps."""

    def __init__(
        self, network: nn.Module, loss_fn: LossFunction, batches: Batches, config: TrainConfig, distributed: Distributed
    ) -> None:
        self.config, self.distributed, self.batches = config, distributed, batches
        self.folder, self.step, self.notes = Path(config.run_dir), 0, list[str]()
        torch.manual_seed(config.seed + distributed.rank)
        self.engine = start_engine(network, config, distributed)
        self.ema = EMA(self.engine.module, config.ema_decay, distributed.rank, distributed.world_size)
        self.generator = torch.Generator(distributed.device)
        begin_random_state(config.seed, 0, self.generator, distributed)
        self.window = Window(distributed)
        self.skips = Skips(config, distributed)
        self.take_step = Step(self.engine, loss_fn, batches, config, self.generator, distributed, self.window)
        self.tracker: Tracker

    def track(self, run_config: Config) -> Tracker:
        self.tracker = Tracker(
            self.folder, self.config, run_config.model_dump(mode="json"), self.step, self.distributed.is_main,
            stage=stage_of(run_config), distributed=self.distributed,
        )  # fmt: skip
        for note in self.notes:
            self.tracker.say(note)
        return self.tracker

    def train(self, signals: Signals, validation: Validation | None, draw: Callable[[], dict[str, float]]) -> None:
        """Step by step to the end, or to the signal, after which UnclipError is raised."""
        config, saved = self.config, self.step
        while self.step < config.steps:
            with self.tracker.counting_flops(self.engine.module):
                losses = self.take_step()
            if self.take_step.applied:
                self.ema.update()
            self.step += 1
            self.skips.count(self.take_step.applied, self.step)
            self.tracker.advance()
            self._tell(losses, validation, draw)
            signal = signals.agreed(self.distributed)
            if signal or self._due(config.checkpoint_every) or self.step == config.steps:
                saved = self.save()
            elif config.guard.compare_every and self._due(config.guard.compare_every):
                compare_weights(self.ema, config, self.step, self.distributed)
            if signal and saved < config.steps:
                kept = self.folder / "checkpoints" / f"step-{saved:08d}"
                raise told_once(Stopped(signal, saved, kept), self.distributed)

    def _tell(
        self,
        losses: Callable[[], dict[str, float]],
        validation: Validation | None,
        draw: Callable[[], dict[str, float]],
    ) -> None:
        """What is told of this step, in one line that is written before its checkpoint."""
        config, row = self.config, dict[str, float]()
        if self._due(config.log_every) or self.step == config.steps:
            row = {**losses(), **self.window.means(), "lr": self.engine.get_lr()[0]}
            row |= {"grad_norm": self.take_step.gradient_norm(), "skipped_steps": self.skips.total}
            row |= self.tracker.speed(self.step)
            row |= Tally.sum(self.distributed.gather(self.batches.tally.state_dict())).metrics()
            if config.log_param_norm:
                row["param_norm"] = parameter_norm(self.engine.module, self.distributed)
        if validation is not None and self._due(config.validate_every):
            row |= validation(self.take_step, self.ema)
        if self._due(config.sample_every):
            row |= draw()
        if row:
            self.tracker.log(self.step, row)

    def save(self) -> int:
        """Write a checkpoint of this step, once it is sure that the processes agree."""
        compare_weights(self.ema, self.config, self.step, self.distributed)
        body = {
            **capture(self.engine, self.ema),
            "step": self.step,
            "random": random_state(self.generator),
            "data": self.batches.state_dict(),
            "window": self.window.state_dict(),
            "skipped": (self.skips.total, self.skips.in_a_row),
        }
        save_checkpoint(
            self.folder / "checkpoints", self.step, body, self.distributed,
            keep=self.config.keep_checkpoints, keep_every=self.config.keep_every,
        )  # fmt: skip
        return self.step

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one, of any number of processes and ZeRO stage."""
        newest = find_checkpoint(self.folder / "checkpoints", self.distributed, self.notes.append)
        if newest is None:
            return
        files = files_of(newest)
        same = len(files) == self.distributed.world_size
        shards = Shards(files, self.distributed.rank if same else 0)
        restore(self.engine, self.ema, shards)
        own = shards.own
        self.step = int(own["step"])
        set_schedule(self.engine, self.step)
        if same and same_kind(own["random"], self.generator):
            restore_random_state(own["random"], self.generator)
        else:
            begin_random_state(self.config.seed, self.step, self.generator, self.distributed)
            if same:
                self.notes.append("the checkpoint is of another kind of device: other noise from here on")
        if same:
            self.window.load_state_dict(own["window"])
        self.skips.total, self.skips.in_a_row = own["skipped"]
        self.batches.load_state_dict([file["data"] for file in shards.files])
        self.notes.append(f"continuing {self.folder} from step {self.step}")

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0


def _draw(
    run: _Run, preview: nn.Module | None, sample: Sample | None, diagnose: Diagnose | None
) -> dict[str, float]:
    """Let the EMA model draw and be measured; returns what was measured, on the first process."""
    state = run.ema.state_dict_full(keep=preview is not None)  # every process takes part
    if preview is None:
        return {}
    preview.load_state_dict(state, strict=False)
    preview.eval().to(run.distributed.device)
    try:
        if sample is not None:
            file = run.folder / "samples" / f"step-{run.step:08d}.png"
            file.parent.mkdir(exist_ok=True)
            temporary = file.with_name(f".tmp-{file.name}")
            sample(preview).save(temporary, format="PNG")
            temporary.replace(file)
            run.tracker.image(run.step, file)
        return diagnose(preview) if diagnose is not None else {}
    finally:
        preview.to("cpu")  # the device's memory is for training
