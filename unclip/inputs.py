"""What a caller hands to a model, checked: prompts, seeds, embeddings, a device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.config import check_steps
from unclip.errors import UnclipError, UsageError

LARGEST_SEED = 2**32 - 1
_LONGEST = 1e12
"""Elements beyond it, or all below its reciprocal, would over- or underflow as squares in float32."""
Steps = int | str | Sequence[int]
"""Sampling steps: a number, a spacing such as "ddim50", or a list of timesteps (unclip.diffusion.timesteps_from)."""


@dataclass(frozen=True)
class SampleOptions:
    """How the stages sample; None means the model's own default."""

    size: int | None = None
    guidance: float | None = None
    prior_guidance: float | None = None
    prior_steps: Steps | None = None
    decoder_steps: Steps | None = None
    upsampler_steps: Steps | None = None
    sampler: str | Callable[..., Tensor] | None = None
    """The name of one of unclip.diffusion.SAMPLERS, or a function like them."""
    eta: float | None = None
    guidance_text: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    embedding_noise_level: int | None = None
    memory_limit: float | None = None
    """MiB that each upsampler may take for a picture beside its weights; what takes more runs in stripes."""

    def __post_init__(self) -> None:
        for name in ("guidance", "prior_guidance", "guidance_text", "eta"):
            value = getattr(self, name)
            if value is not None and not (_is_real(value) and 0 <= value < math.inf):
                raise UsageError(f"{name} is {value!r}, expected a number of 0 or more")
        for name in ("prior_steps", "decoder_steps", "upsampler_steps"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name} is {value}, expected 1 or more")
            if value is not None:
                check_steps(value)
        to_bytes(self.memory_limit)
        interval, rescale = self.guidance_interval, self.guidance_rescale
        fractions = isinstance(interval, Sequence) and len(interval) == 2 and all(map(_is_real, interval))
        if interval is not None and not (fractions and 0 <= interval[0] <= interval[1] <= 1):
            raise UsageError(
                f"guidance_interval is {interval!r}, expected two fractions of the timesteps, 0 <= low <= high <= 1"
            )
        if rescale is not None and not (_is_real(rescale) and 0 <= rescale <= 1):
            raise UsageError(f"guidance_rescale is {rescale!r}, expected 0 (none) to 1")

    def of_decoder(self) -> dict[str, Any]:
        """Those that DecoderStage.sample takes."""
        shared = ("guidance_text", "guidance_interval", "guidance_rescale", "embedding_noise_level", "sampler", "eta")
        return {"steps": self.decoder_steps, "guidance": self.guidance, **{n: getattr(self, n) for n in shared}}


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def to_bytes(memory_limit: float | None) -> int | None:
    """A memory limit in MiB as bytes. UsageError: not above 0."""
    if memory_limit is None:
        return None
    if not (_is_real(memory_limit) and 0 < memory_limit < math.inf):
        raise UsageError(f"memory_limit is {memory_limit!r}, expected a number of MiB above 0")
    return int(memory_limit * 2**20)


def check_prompts(prompts: str | Sequence[str], name: str = "prompt") -> list[str]:
    """One prompt or several as a list; `name` is what messages call one. UsageError: none, one that is empty or no
    text.
    """
    if not isinstance(prompts, (str, Iterable)):
        raise UsageError(f"the {name} is {prompts!r}, not a text")
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    if not several:
        raise UsageError(f"no {name} given")
    for number, prompt in enumerate(several):
        if not isinstance(prompt, str) or not prompt.strip():
            mend = "say what the picture shows, such as 'pizza'" if name == "prompt" else "expected a word or more"
            kind = "is empty" if isinstance(prompt, str) else f"is {prompt!r}, not a text"
            raise UsageError(f"{name} {number + 1} {kind}; {mend}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} {number + 1} ({prompt!a}) is not valid UTF-8 text") from error
    return several


def check_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed a sample: a single seed serves all of them. UsageError: another number of seeds, or one out of
    range.
    """
    try:
        given = list(seed) if isinstance(seed, Iterable) else [seed] * count
        seeds = [index(one) for one in given]  # numpy's whole numbers too
    except TypeError as error:
        raise UsageError(f"the seed is {seed!r}; expected a whole number, or one a sample") from error
    if len(seeds) != count:
        raise UsageError(
            f"{len(seeds)} seeds for {count} samples; expected one each, or a single one for all"
        )
    for one in seeds:
        if not 0 <= one <= LARGEST_SEED:
            raise UsageError(f"the seed {one} is out of range; expected 0 to {LARGEST_SEED}")
    return seeds


def check_output(output: str) -> None:
    """UsageError unless pictures are asked for in a form that there is."""
    if output not in ("pil", "tensor"):
        raise UsageError(f"output is {output!r}; expected 'pil' or 'tensor'")


def check_count(count: int) -> None:
    """UsageError unless at least one picture is asked for."""
    if not isinstance(count, Integral):
        raise UsageError(f"num_images is {count!r}, expected a whole number")
    if count < 1:
        raise UsageError(f"num_images is {count}, expected 1 or more")


def check_dtype(dtype: Any) -> None:
    """UsageError unless networks can compute in it."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"dtype is {dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16")


def check_size(size: int, possible: Sequence[int]) -> int:
    """The size, if it is one of those; UsageError lists them."""
    if size not in possible:
        raise UsageError(
            f"size {size!r} cannot be made by this model; it makes {', '.join(map(str, possible))}"
        )
    return size


def check_embeddings(embeddings: Any, dim: int, *, unit_length: bool = True) -> Tensor:
    """Embeddings as float32 (B, E), brought to unit length or left as they are. UsageError: wrong width, not floats,
    NaN or infinity, zero length; all of length 1, where they are to be as long as the CLIP makes them.
    """
    tensor = embeddings if isinstance(embeddings, Tensor) else None
    if tensor is None:
        array = np.asarray(embeddings)
        if array.dtype.kind != "f":
            raise UsageError(f"embeddings of type {array.dtype}; expected floating point numbers")
        tensor = torch.from_numpy(array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32))
    if not tensor.is_floating_point():
        raise UsageError(f"embeddings of type {tensor.dtype}; expected floating point numbers")
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim == 2 and not len(tensor):
        raise UsageError("no embedding given: there are 0 rows, expected 1 or more")
    if tensor.ndim != 2 or tensor.shape[1] != dim:
        raise UsageError(f"embeddings of shape {tuple(tensor.shape)}; this model takes (count, {dim})")
    bad = ~torch.isfinite(tensor).all(dim=1)
    if bad.any():
        raise UsageError(
            f"embedding {int(bad.nonzero()[0])} holds NaN or infinity ({int(bad.sum())} of {len(tensor)} do)"
        )
    largest = tensor.abs().amax(dim=1, keepdim=True)
    if (largest == 0).any():
        raise UsageError(
            f"embedding {int((largest[:, 0] == 0).nonzero()[0])} is all zeros, which has no direction"
        )
    odd = (largest > _LONGEST) | (largest < 1 / _LONGEST)
    if not odd.any():
        tensor = tensor.float()
    elif unit_length:
        tensor = torch.where(odd, tensor / largest, tensor).float()
    else:
        raise UsageError(
            f"embedding {int(odd[:, 0].nonzero()[0])} has elements of up to {float(largest[odd][0]):.3g}; this model "
            "reads embeddings with the CLIP's own length"
        )
    lengths = tensor.norm(dim=1, keepdim=True)
    if not unit_length and bool(((lengths - 1).abs() < 1e-3).all()):
        raise UsageError(
            "embeddings of length 1; this model reads them as long as its CLIP makes them, as "
            "`unclip embed --raw-length` and `embed_image` give them"
        )
    return tensor / lengths if unit_length else tensor


def read_embeddings(file: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped and never unpickled.

    UnclipError: no such file. UsageError: not .npy, pickled objects, no floats.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(6)
    except OSError as error:
        raise UnclipError(f"the embeddings {file} cannot be read: {error.strerror or error}") from error
    if start != b"\x93NUMPY":
        kind = "a .npz archive" if start.startswith(b"PK") else "not a .npy file"
        raise UsageError(f"{file} is {kind}; expected one array written by numpy.save")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can raise nearly anything
        if "object" in str(error).lower():
            raise UsageError(
                f"{file} holds pickled Python objects, which are never loaded; expected floats"
            ) from error
        raise UsageError(f"{file} is damaged or empty: {error}") from error
    if array.dtype.kind != "f" or array.ndim not in (1, 2):
        raise UsageError(
            f"{file} holds {array.dtype} of shape {array.shape}; expected floats of shape (N, E) or (E,)"
        )
    return array


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """'auto' (or None: CUDA where there is one, else the CPU), 'cpu', 'cuda' or 'cuda:N' as a device.

    UsageError: another name. UnclipError: a CUDA device that is not there.
    """
    if isinstance(name, torch.device) and name.type != "cuda":
        return name
    text = "auto" if name is None else str(name)
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UsageError(f"unknown device {text!r}; possible: auto, cpu, cuda, cuda:N")
    device = torch.device(text)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UnclipError(
                "there is no CUDA device here that this PyTorch can use; leave the device away or use 'cpu'"
            )
        if (device.index or 0) >= count:
            raise UnclipError(
                f"there is no {text} here; there are {count} CUDA devices, cuda:0 to cuda:{count - 1}"
            )
    return device
