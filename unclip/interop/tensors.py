"""Tensors of other people's folders: described by their headers before memory is taken, then read memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.bundle import read_json
from unclip.errors import UnclipError

WEIGHTS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model's folder, whole or sharded; full precision before `.fp16`.

    Raises UnclipError: there are none, pickled ones alone, or an index that leads outside the folder.
    """
    for name in WEIGHTS:
        for variant in _VARIANTS:
            index = folder / f"{name}.safetensors.index{variant}.json"
            single = folder / f"{name}{variant}.safetensors"
            if index.is_file():
                return _shards(index)
            if single.is_file():
                return [single]
    pickled = next((file for kind in ("*.bin", "*.pt", "*.ckpt") for file in sorted(folder.glob(kind))), None)
    if pickled is not None:
        raise UnclipError(f"{pickled} is pickled, and nothing is unpickled here; save the model as safetensors first")
    raise UnclipError(f"{folder} has no weights; expected {WEIGHTS[0]}.safetensors or {WEIGHTS[1]}.safetensors")


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder as it will be, on the meta device: shapes and types without their memory.

    Raises UnclipError: as `weight_files`; a damaged file, a type that no weight here has.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = opened.get_slice(name)
                    kind = part.get_dtype()
                    if kind not in _DTYPES:
                        raise UnclipError(f"{name} in {file} is of type {kind}; expected one of {', '.join(_DTYPES)}")
                    found[name] = torch.empty(part.get_shape(), dtype=_DTYPES[kind], device="meta")
        except (SafetensorError, OSError) as error:
            raise UnclipError(f"{file} is damaged or not a safetensors file: {error}") from error
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder in the type it is stored in. The files are mapped, not read: memory is taken
    by what is computed with. Raises UnclipError as `weight_files`, and for a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UnclipError(f"{file} is damaged or not a safetensors file: {error}") from error
    return state


def check_shapes(own: Mapping[str, Tensor], converted: Mapping[str, Tensor], what: str) -> None:
    """UnclipError naming the first tensors that are not the network's, by name or shape; both may be on meta."""
    problems = [f"missing {name}" for name in own if name not in converted]
    problems += [f"unknown {name}" for name in converted if name not in own]
    problems += [
        f"{name} is {tuple(converted[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UnclipError(f"{what} does not have the shape of its config.json: {'; '.join(problems[:3])}{more}")


def as_dtype(state: Mapping[str, Tensor], dtype: torch.dtype | None, what: str) -> dict[str, Tensor]:
    """Floating tensors as `dtype`, or as they are. UnclipError: a value is too large for it, or not finite."""
    if dtype is None:
        return dict(state)
    converted = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for name, value in converted.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            kind = str(dtype).removeprefix("torch.")
            raise UnclipError(f"{name} of {what} holds NaN, infinity or values too large for {kind}")
    return converted


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise UnclipError(f"{index} names no weights; expected {{'weight_map': {{tensor: file, …}}}}")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnclipError(f"{index} names {name!r}; expected safetensors files beside it")
        if not (index.parent / name).is_file():
            raise UnclipError(f"{index.parent} is incomplete: {name} is missing")
    return [index.parent / name for name in names]
