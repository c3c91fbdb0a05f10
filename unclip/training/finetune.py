"""What of a network learns: all of it, what patterns of parameters say, or low-rank adapters beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from unclip.adapters import adapter_state, add_adapter, below, merged_state, save_adapter, shell_of
from unclip.config import TrainConfig
from unclip.errors import UnclipError, UsageError, nearest

ADAPTER = "adapter"
_CHOICES = ("freeze", "trainable", "lora")


class Tuning:
    """`train.freeze`, `train.trainable` or `train.lora` applied to a network before it is trained, in place.

    `kind` is the kind of part and `model` its configuration; both go into an adapter's folder.
    Raises UsageError: a pattern that matches nothing, nothing left to learn. UnclipError: peft is missing, or the run
    folder holds a run in which something else learned.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, kind: str, model: Any) -> None:
        self.network, self.kind, self.model, self.lora = network, kind, model, config.lora
        _check_run(config)
        tune(network, config)
        if config.lora is not None:
            self._shell = shell_of(network)

    def exporting(self, export: Callable[[dict[str, Tensor], Path], Any]) -> Callable[[dict[str, Tensor], Path], Path]:
        """`export` for a network that may have adapters: it gets the plain network's state, and `adapter/` is written
        beside its folder, as `train.lora.export` says. Returns the folder of the model, or else of the adapter.
        """

        def write(state: dict[str, Tensor], folder: Path) -> Path:
            if self.lora is None:
                export(state, folder)
                return folder
            beside = folder.with_name(ADAPTER)
            if self.lora.export != "merged":
                save_adapter(beside, self.kind, self.model, self.network, adapter_state(state))
            if self.lora.export == "adapter":
                return beside
            export(merged_state(copy.deepcopy(self._shell), state), folder)
            return folder

        return write

    @property
    def writes_model(self) -> bool:
        """Whether the run ends with a whole model."""
        return self.lora is None or self.lora.export != "adapter"


def tune(network: nn.Module, config: TrainConfig) -> None:
    """Let learn what `train.freeze`, `train.trainable` or `train.lora` say. Raises as `Tuning`."""
    if config.lora is not None:
        add_adapter(network, config.lora, config.seed)
    else:
        choose_trainable(network, config.freeze, config.trainable)


def choose_trainable(network: nn.Module, freeze: Sequence[str] = (), trainable: Sequence[str] = ()) -> None:
    """Freeze the parameters that match a pattern of `freeze`, or those that match none of `trainable`.

    A pattern is a shell pattern of dotted names, `unet.down.*`; what stands below a match is matched too. What is
    frozen already stays so. Raises UsageError: a pattern that matches nothing, or nothing left to learn.
    """
    names = [name for name, _ in network.named_parameters()]
    for key, patterns in (("freeze", freeze), ("trainable", trainable)):
        for pattern in patterns:
            if not any(below(name, pattern) for name in names):
                raise UsageError(
                    f"train.{key} {pattern!r} matches no parameter of this network; {nearest(pattern, names)}"
                )
    for name, parameter in network.named_parameters():
        chosen = not trainable or any(below(name, pattern) for pattern in trainable)
        if not chosen or any(below(name, pattern) for pattern in freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError("nothing is left to learn: train.freeze and train.trainable freeze every parameter")


def _check_run(config: TrainConfig) -> None:
    """A run that goes on trains what it has trained: its optimizer knows of nothing else."""
    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    if not file.is_file() or not any((run_dir / "checkpoints").glob("step-*")):
        return
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))["train"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return  # the loop says what is wrong with the folder
    now = config.model_dump(mode="json")
    for key in _CHOICES:
        then = before.get(key) or None
        if key == "lora" and then is not None and now[key] is not None:
            then, now[key] = ({**lora, "export": None} for lora in (then, now[key]))
        if then != (now[key] or None):
            raise UnclipError(
                f"{run_dir} holds a run with another train.{key} (see {file}); choose another train.run_dir, and "
                "init_from if it is to start from this one"
            )
