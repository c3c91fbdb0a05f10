"""One training loop for every stage. A stage gives it a network, a loss function and batches, never a subclass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from unclip.config import Config, TrainConfig
from unclip.data import Batches
from unclip.errors import UnclipError
from unclip.training.checkpoint import load_checkpoint, save_checkpoint
from unclip.training.distributed import Distributed, current
from unclip.training.ema import EMA
from unclip.training.engine import start_engine
from unclip.training.metrics import Window, parameter_norm
from unclip.training.tracking import Tracker, stage_of

LossFunction = Callable[[Any, Any, torch.Generator], dict[str, Tensor]]
Export = Callable[[dict[str, Tensor], Path], None]
Sample = Callable[[nn.Module], Image.Image]
Diagnose = Callable[[nn.Module], dict[str, float]]


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
    is on
    the device. `export(ema_state, folder)` writes a model folder; `sample(ema_network)` draws a grid for
    `run_dir/samples`, `diagnose(ema_network)` measures more than a loss tells; both every `sample_every` steps.
    Returns the model folder. Raises UnclipError: the run folder cannot be written, or holds a run of another model.
    """
    distributed = current()
    run_dir = Path(config.run_dir)
    _open_run(run_dir, run_config, distributed)
    preview = copy.deepcopy(network) if (sample or diagnose) is not None and distributed.is_main else None
    torch.manual_seed(config.seed + distributed.rank)
    engine = start_engine(network, config, distributed)
    ema = EMA(engine.module, config.ema_decay)
    generator = torch.Generator(distributed.device).manual_seed(config.seed * 1_000_003 + distributed.rank)
    window = Window(distributed)
    step = _resume(run_dir, engine, ema, generator, batches, window, config, distributed)
    tracker = Tracker(
        run_dir, config, run_config.model_dump(mode="json"), step, distributed.is_main,
        stage=stage_of(run_config), distributed=distributed,
    )  # fmt: skip
    with tracker:
        if step:
            tracker.say(f"continuing {run_dir} from step {step}")
        train_step = _Step(engine, _compiled(loss_fn, config), batches, config, generator, distributed, window)
        while step < config.steps:
            with tracker.counting_flops(engine.module):
                losses = train_step()
            ema.update()
            step += 1
            tracker.advance()
            row: dict[str, float] = {}  # what is told of this step, in one line that is written before its checkpoint
            if step % config.log_every == 0 or step == config.steps:
                row = {**losses(), **window.means(), "lr": engine.get_lr()[0], "grad_norm": train_step.gradient_norm()}
                row |= tracker.speed(step)
                if config.log_param_norm:
                    row["param_norm"] = parameter_norm(engine.module, distributed)
            if config.sample_every and step % config.sample_every == 0:
                row |= _draw(run_dir, step, ema, preview, sample, diagnose, tracker)
            if row:
                tracker.log(step, row)
            if step % config.checkpoint_every == 0 or step == config.steps:
                own = _own_state(ema, generator, batches, window)
                save_checkpoint(run_dir / "checkpoints", step, engine, own, config.keep_checkpoints, distributed)
        state = ema.state_dict_full()
        if distributed.is_main:
            export(state, run_dir / "model")
        tracker.say(batches.tally.report())
        tracker.say(f"trained to step {step}; the model is in {run_dir / 'model'}")
    return run_dir / "model"


class _Step:
    """One optimizer step: all its micro-batches through loss, backward and the engine's step."""

    def __init__(
        self,
        engine: Any,
        loss_fn: LossFunction,
        batches: Batches,
        config: TrainConfig,
        generator: torch.Generator,
        distributed: Distributed,
        window: Window,
    ) -> None:
        self.window = window
        self.engine, self.loss_fn, self.batches, self.config = engine, loss_fn, batches, config
        self.generator, self.device = generator, distributed.device
        self._norm: Any = None

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping."""
        norm = self.engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm) if norm is not None else 0.0

    def __call__(self) -> Callable[[], dict[str, float]]:
        """Returns a function that reads the last micro-batch's mean losses (reading waits for the device)."""
        losses: dict[str, Tensor] = {}
        for _ in range(self.config.accumulation):
            batch: dict[str, Any] = dict(next(self.batches))
            batch["image"] = batch["image"].to(self.device, non_blocking=True)
            # The one place where autocast is entered.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                losses = self.loss_fn(self.engine, batch, self.generator)
            self.window.add(losses)
            self.engine.backward(losses["loss"].mean())
            if self.config.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
                # DeepSpeed keeps the norm itself only where it partitions the gradients.
                gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
                self._norm = torch.nn.utils.get_total_norm(gradients)
            self.engine.step()
        return lambda: {name: value.float().mean().item() for name, value in Window.told(losses).items()}


def _open_run(run_dir: Path, run_config: Config, distributed: Distributed) -> None:
    """Make the folder and record the configuration; refuse a folder that holds a run of another model."""
    file = run_dir / "config.yaml"
    body = run_config.model_dump(mode="json")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if file.exists() and (run_dir / "checkpoints").exists():
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(before, dict) and _model_of(before, run_config) != body.get("model"):
                raise UnclipError(f"{run_dir} holds a run of another model (see {file}); choose another train.run_dir")
        if distributed.is_main:
            temporary = run_dir / ".tmp-config.yaml"
            temporary.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
            temporary.replace(file)
    except OSError as error:
        raise UnclipError(f"the run folder {run_dir} cannot be written: {error.strerror or error}") from error


def _model_of(before: dict[str, Any], run_config: Config) -> Any:
    """The model of a recorded configuration, with today's defaults where it is older than an option."""
    try:
        return type(run_config).model_validate(before).model_dump(mode="json").get("model")
    except ValidationError:
        return before.get("model")


def _resume(
    run_dir: Path,
    engine: Any,
    ema: EMA,
    generator: torch.Generator,
    batches: Batches,
    window: Window,
    config: TrainConfig,
    distributed: Distributed,
) -> int:
    own = load_checkpoint(run_dir / "checkpoints", engine, config.zero_stage, distributed)
    if own is None:
        return 0
    ema.load_state_dict(own["ema"])
    step = int(own["step"])
    if own["generator"] is None:  # other processes than before: new noise, not that of the first steps again
        generator.manual_seed((config.seed + step) * 1_000_003 + distributed.rank)
        torch.manual_seed(config.seed + step + distributed.rank)
    else:
        generator.set_state(own["generator"])
        torch.set_rng_state(own["torch_rng"])
    if own["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda_rng"])
    batches.load_state_dict(own["data"])
    window.load_state_dict(own.get("window", {}))
    return step


def _own_state(ema: EMA, generator: torch.Generator, batches: Batches, window: Window) -> dict[str, Any]:
    return {
        "ema": ema.state_dict(),
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "data": batches.state_dict(),
        "window": window.state_dict(),
    }


def _draw(
    run_dir: Path,
    step: int,
    ema: EMA,
    preview: nn.Module | None,
    sample: Sample | None,
    diagnose: Diagnose | None,
    tracker: Tracker,
) -> dict[str, float]:
    """Let the EMA model draw and be measured; returns what was measured, on the first process."""
    state = ema.state_dict_full()  # every process takes part
    if preview is None:
        return {}
    preview.load_state_dict(state, strict=False)
    if sample is not None:
        file = run_dir / "samples" / f"step-{step:08d}.png"
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_name(f".tmp-{file.name}")
        sample(preview.eval()).save(temporary, format="PNG")
        temporary.replace(file)
        tracker.image(step, file)
    return diagnose(preview.eval()) if diagnose is not None else {}


def _compiled(loss_fn: LossFunction, config: TrainConfig) -> LossFunction:
    return torch.compile(loss_fn) if config.compile else loss_fn
