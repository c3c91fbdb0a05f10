"""Checkpoints of DALLE2-pytorch (LAION's among them): what is in the file, and which release's numerics it needs.

Its releases changed what they compute under the same names of tensors: attention with CogView's relaxation, then by
cosine similarity; what a dropped caption replaces; down-sampling. A checkpoint therefore counts with the version it
tells, and a version whose code has not been compared here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclip.bundle import read_json
from unclip.config import ScheduleName
from unclip.diffusion.schedule import betas
from unclip.errors import UnclipError
from unclip.interop.containers import read_container, tensors_of
from unclip.interop.records import version_text
from unclip.nn.multiquery import Similarity

OLDEST, NEWEST = (0, 26, 2), (1, 15, 6)
_SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "linear", "quadratic", "sigmoid")
_CONFIG_NAMES = {"prior": ("prior_config.json", "config.json"), "decoder": ("decoder_config.json", "config.json")}
Kind = Literal["prior", "decoder"]


class Dalle2Checkpoint(NamedTuple):
    """What a file of DALLE2-pytorch holds of one model."""

    file: Path
    kind: Kind
    state: dict[str, Tensor]  # as the package's DiffusionPrior or Decoder names it
    config: dict[str, Any] | None  # of that class; from inside the file or the JSON beside it
    version: str | None
    averaged: bool  # whether these are the exponential moving average


class Era(NamedTuple):
    """What a release computes."""

    version: str
    number: tuple[int, int, int]
    relaxed: bool

    def similarity(self, cosine: bool = True) -> Similarity:
        """Of self-attention. Until 1.4.2 there was no cosine similarity to choose."""
        if self.relaxed:
            return "scaled"
        return "cosine" if cosine else "twice_scaled"

    @property
    def whole_time(self) -> bool:
        """Whether continuous timesteps become sinusoids of their own integer type."""
        return self.number < (1, 10, 7)

    @property
    def linear_attention(self) -> Literal["plain", "mean", "normed"]:
        """What linear attention does to values."""
        return "plain" if self.number < (1, 2, 0) else "mean" if self.number < (1, 4, 0) else "normed"


def era_of(version: str | None, origin: str) -> Era:
    """UnclipError: no version, or one whose numerics are not known here."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version or "")
    if version is None or found is None:
        raise UnclipError(
            f"{origin} does not tell which release of DALLE2-pytorch wrote it{f' ({version!r})' if version else ''}, "
            "and its releases compute different things from the same weights; pass the version ('1.6.5')"
        )
    number = (int(found[1]), int(found[2]), int(found[3]))
    if not OLDEST <= number <= NEWEST or number == (1, 10, 3):
        known = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} without 1.10.3"
        raise UnclipError(
            f"{origin} is of DALLE2-pytorch {version}, an unsupported era: its attention and norms have not been "
            f"compared with that release; known are {known}"
        )
    return Era(version, number, number < (1, 4, 3))


def is_dalle2(stored: Mapping[str, Any]) -> Kind | None:
    """The kind of model in an opened container of DALLE2-pytorch, None where it is something else."""
    state = _states(stored)[0]
    names = state if isinstance(state, Mapping) else {}
    if any(str(name).endswith("causal_transformer.rel_pos_bias.relative_attention_bias.weight") for name in names):
        return "prior"
    if any(str(name).endswith("to_time_hiddens.1.weight") for name in names):
        return "decoder"
    return None


def recognise(path: Path) -> bool:
    """Whether a file, or the only weights file of a folder, is a checkpoint of DALLE2-pytorch. Never raises."""
    try:
        return is_dalle2(read_container(_weights_file(path))) is not None
    except (UnclipError, OSError):
        return False


def read_checkpoint(
    path: Path, config: Path | Mapping[str, Any] | None = None, version: str | None = None
) -> Dalle2Checkpoint:
    """Open a file (or the folder that holds it): averaged weights where there are some.

    `config` is the JSON of the run that trained it, or its path; by default what the file itself holds, or
    `prior_config.json`, `decoder_config.json` or `config.json` beside it. `version` overrides the one in the file.
    Raises UnclipError: as `read_container`, or nothing of DALLE2-pytorch in it.
    """
    file = _weights_file(path)
    stored = read_container(file)
    kind = is_dalle2(stored)
    if kind is None:
        found = ", ".join(list(map(str, stored))[:6])
        raise UnclipError(f"{file} is no checkpoint of DALLE2-pytorch: it holds {found or 'nothing'}")
    state, averaged = _states(stored)
    section = _config(file, kind, config, stored)
    own = tensors_of(file, {k: v for k, v in state.items() if isinstance(v, Tensor)}, f"weights of a {kind}")
    return Dalle2Checkpoint(file, kind, own, section, version or version_text(stored.get("version")), averaged)


def schedule_of(table: Tensor | None, asked: str | None, origin: str) -> tuple[ScheduleName, int]:
    """(Schedule, T) from the stored β (T,), checked against the configuration's. UnclipError: none that is known here,
    or the two contradict each other.
    """
    if table is None:
        if asked is not None and asked not in _SCHEDULES:
            raise UnclipError(f"{origin} has the schedule {asked!r}; known are {', '.join(_SCHEDULES)}")
        return asked or "cosine", 1000  # type: ignore[return-value]
    stored = table.double().numpy()
    for name in _SCHEDULES:
        if np.abs(betas(name, len(stored)) - stored).max() < 1e-5:
            if asked is not None and asked != name:
                raise UnclipError(f"{origin} was trained on a {name} schedule, and its configuration says {asked!r}")
            return name, len(stored)
    raise UnclipError(f"{origin} has a noise schedule that is none of {', '.join(_SCHEDULES)}")


def renamed(state: Mapping[str, Tensor], rules: Mapping[str, str], origin: str) -> dict[str, Tensor]:
    """Tensors under our names, by the first of the regular expressions that is the whole of theirs. UnclipError: one
    that no rule knows."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, ours in rules.items():
            found = re.fullmatch(pattern, name)
            if found:
                result[found.expand(ours)] = tensor.float() if tensor.is_floating_point() else tensor
                break
        else:
            raise UnclipError(f"{origin} holds {name}, which no supported model of DALLE2-pytorch has")
    return result


def check_state(own: torch.nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """UnclipError unless names and shapes are exactly those of a module, which may be on the meta device."""
    wanted = {name: tuple(tensor.shape) for name, tensor in own.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"missing {name}" for name in sorted(set(wanted) - set(found))]
    problems += [f"unknown {name}" for name in sorted(set(found) - set(wanted))]
    problems += [f"{n} is {found[n]}, expected {s}" for n, s in wanted.items() if n in found and found[n] != s]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UnclipError(f"{origin} does not fit its configuration: {'; '.join(problems[:3])}{more}")


# ---- what lies where in the file -----------------------------------------------------------------------


def _states(stored: Mapping[str, Any]) -> tuple[Any, bool]:
    """The best state dict of a container, and whether it is averaged. Trainers keep the plain model, the moving average
    (`ema_model`, or inside `ema`) and their own state side by side; a bare state dict is itself.
    """
    if isinstance(stored.get("ema_model"), Mapping):
        return stored["ema_model"], True
    ema, model = stored.get("ema"), stored.get("model")
    if isinstance(ema, Mapping):
        prior = {name.removeprefix("ema_model."): v for name, v in ema.items() if str(name).startswith("ema_model.")}
        if prior:
            return prior, True
        # A decoder's: one average a U-Net, as a list of modules.
        unets = {
            f"unets.{found[1]}.{found[2]}": v
            for name, v in ema.items()
            if (found := re.fullmatch(r"(\d+)\.ema_model\.(.+)", str(name)))
        }
        if unets and isinstance(model, Mapping):
            return {**{k: v for k, v in model.items() if not str(k).startswith("unets.")}, **unets}, True
    if isinstance(model, Mapping):
        return model, False
    return stored, False


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".pt", ".ckpt"))
    for name in ("latest.pth", "best.pth"):
        files = [file for file in files if file.name == name] or files
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UnclipError(f"{path} holds not one checkpoint of torch (found: {found}); name the file itself")
    return files[0]


def _config(file: Path, kind: Kind, given: Path | Mapping[str, Any] | None, stored: Mapping[str, Any]) -> Any:
    """The section of `kind` in a run's configuration."""
    if isinstance(given, Mapping):
        body: Any = given
    elif given is not None:
        body = read_json(given)
    elif isinstance(stored.get("config"), Mapping):
        body = stored["config"]
    else:
        beside = next((file.parent / name for name in _CONFIG_NAMES[kind] if (file.parent / name).is_file()), None)
        body = None if beside is None else read_json(beside)
    if body is None:
        return None
    section = body.get(kind, body)
    if not isinstance(section, Mapping) or not ({"net", "unets", "image_embed_dim", "image_size"} & set(section)):
        raise UnclipError(f"the configuration of {file} has no section {kind!r} of a run of DALLE2-pytorch")
    return dict(section)
