"""Watching a run: metrics.jsonl always, a progress bar on the terminal, Weights & Biases where wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.config import TrainConfig


class Tracker:
    """Writes one JSON object a logged step to `metrics.jsonl`. Processes other than the first write nothing."""

    def __init__(self, run_dir: Path, config: TrainConfig, full_config: dict[str, Any], start: int, main: bool) -> None:
        self.main = main
        self.wandb: Any = None
        if not main:
            return
        self.file = run_dir / "metrics.jsonl"
        self._forget_after(start)
        self.bar = tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True)
        if config.wandb.mode != "disabled":
            self.wandb = _start_wandb(run_dir, config, full_config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.main:
            return
        row = {"step": step, **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        shown = {"loss": f"{metrics['loss']:.4f}", "img/s": f"{metrics['images_per_second']:.1f}"}
        self.bar.set_postfix(shown, refresh=False)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def advance(self) -> None:
        if self.main:
            self.bar.update(1)

    def image(self, step: int, file: Path) -> None:
        if self.main and self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Image(str(file))}, step=step)

    def say(self, text: str) -> None:
        if self.main and text:
            tqdm.write(text)

    def close(self) -> None:
        if not self.main:
            return
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _forget_after(self, step: int) -> None:
        """Steps after the checkpoint will be made again; a line cut by a kill goes too."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        temporary = self.file.with_name(".tmp-metrics.jsonl")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.file)


def _start_wandb(run_dir: Path, config: TrainConfig, full_config: dict[str, Any]) -> Any:
    import wandb

    mode = config.wandb.mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        project=config.wandb.project,
        name=config.wandb.name or run_dir.name,
        tags=list(config.wandb.tags),
        dir=str(run_dir),
        mode=mode,  # type: ignore[arg-type]
        config=full_config,
        resume="allow",
    )
