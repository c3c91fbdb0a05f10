"""Files that hold weights, opened without running anything in them.

safetensors and torch's files (zip and the older stream; .pt, .pth, .ckpt, .bin, whatever they are called) are read;
torch's only by `weights_only` and the names in `unclip.interop.records`. Before a tensor is made, what the file
declares is held against its size: a header that claims a terabyte, a compressed or overlapping zip and a tensor larger
than its storage are refused with a sentence.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.errors import UnclipError
from unclip.interop.records import CONTAINERS, RECORDS

_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_LONGEST_HEADER = 100 * 2**20  # of safetensors' own specification
_MAGIC = 0x1950A86A20F9469CFC6C  # the first thing in torch's older stream
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".th")


def read_container(file: Path) -> dict[str, Any]:
    """All that a weights file holds: a flat {name: tensor} of a safetensors file, or the nested dictionary of a file
    that torch saved, in which objects that are no tensors are `Record`s.

    Raises UnclipError: no such file, damaged, a tensor larger than the file, code in a pickle.
    """
    if not file.is_file():
        raise UnclipError(f"there is no weights file at {file}")
    if _is_safetensors(file):
        return dict(read_safetensors(file))
    stored = read_torch(file)
    if not isinstance(stored, Mapping):
        raise UnclipError(f"{file} holds a {type(stored).__name__}; expected a dictionary of weights")
    return dict(stored)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """{name: tensor} as stored. Raises UnclipError as `safetensors_shapes`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safetensors_shapes(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UnclipError(f"{file} is damaged or not a safetensors file: {error}") from error


def safetensors_shapes(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype as safetensors names it, shape)} from the header alone.

    Raises UnclipError: not such a file, or a header whose shapes, dtypes and places do not fill the file exactly.
    """
    size = file.stat().st_size
    header, start = _header(file, size)
    spans: list[tuple[int, int]] = []
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        told: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
        if not _whole(shape) or not _whole(offsets) or shape is None or offsets is None or len(offsets) != 2:
            raise UnclipError(f"{file} is damaged: its header does not describe {name!r} as a tensor")
        if dtype not in _BYTES:
            raise UnclipError(f"{file} holds {name!r} as {dtype!r}; known are {', '.join(_BYTES)}")
        begin, end = offsets
        if prod(shape) * _BYTES[dtype] != end - begin or start + end > size:
            raise UnclipError(
                f"{file} is damaged: {name!r} claims {dtype} {list(shape)}, {_told(prod(shape) * _BYTES[dtype])}, and "
                f"the file of {_told(size)} has {_told(max(min(end, size - start) - begin, 0))} for it"
            )
        spans.append((begin, end))
        found[name] = (dtype, tuple(shape))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise UnclipError(f"{file} is damaged: its tensors overlap, or leave gaps between them")
        reached = end
    if start + reached != size:
        raise UnclipError(f"{file} is damaged: {_told(size - start - reached)} belong to no tensor")
    return found


def tensors_of(file: Path, stored: Any, what: str = "weights") -> dict[str, Tensor]:
    """A dictionary of a checkpoint as a state dict. UnclipError: it is none."""
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        kind = type(stored).__name__
        raise UnclipError(f"{file} holds no {what}: expected {{name: tensor}}, found a {kind}")
    return {str(name): tensor for name, tensor in stored.items()}


# ---- safetensors ---------------------------------------------------------------------------------------


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK"


def _header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and where the tensors begin."""
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise UnclipError(f"{file} is damaged: {_told(size)} are too few for a safetensors file")
        (length,) = struct.unpack("<Q", first)
        if length > min(size - 8, _LONGEST_HEADER):
            raise UnclipError(f"{file} is damaged: its header claims {_told(length)}, and the file has {_told(size)}")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UnclipError(f"{file} is damaged: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise UnclipError(f"{file} is damaged: its header is a {type(header).__name__}, expected an object")
    return header, 8 + length


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)


# ---- torch's files -------------------------------------------------------------------------------------


def read_torch(file: Path) -> Any:
    """What torch saved in a file: tensors, which are slices of it, plain containers and `Record`s. UnclipError as
    `read_container`."""
    zipped = zipfile.is_zipfile(file)
    if zipped:
        _check_zip(file)
    elif _is_tar(file):
        raise UnclipError(
            f"{file} is in the tar format that torch wrote before 2018, which can only be unpickled whole, and nothing "
            "is here; load it in an environment you trust and save its tensors as safetensors"
        )
    else:
        _check_stream(file)
    if not hasattr(torch.serialization, "safe_globals"):
        raise UnclipError(f"reading {file} needs torch 2.5 or newer; this is {torch.__version__}")
    try:
        with torch.serialization.safe_globals([*RECORDS, *CONTAINERS]):
            # Mapped, tensors are slices of the file: nothing is read before it is used, nor beyond the file's end.
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler raises whatever a damaged stream leads it into
        raise UnclipError(_refusal(file, error)) from error
    _check_tensors(file, stored)
    return stored


def _refusal(file: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
    name = (named.group(1) or named.group(2)) if named else None
    if name is not None or "weights_only" in str(error).lower():
        what = f"names {name}, " if name else "holds "
        return (
            f"{file} {what}which is no tensor: loading it would run code, so it is refused; load it in an environment "
            "you trust and save its tensors as safetensors"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{file} is damaged or not a file that torch saved: {reason}"


def _is_tar(file: Path) -> bool:
    try:
        return tarfile.is_tarfile(file)
    except OSError:
        return False


def _check_zip(file: Path) -> None:
    """torch stores tensors as they are; whatever is packed smaller than it unpacks was made by someone else."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                parts = Path(member.filename.replace("\\", "/")).parts
                if member.filename.startswith("/") or ".." in parts:
                    raise UnclipError(f"{file} names a member outside itself ({member.filename!r}), so it is refused")
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise UnclipError(
                        f"{file} is compressed ({member.filename!r}), which torch never does; it is refused, as it may "
                        "unpack to any size"
                    )
            if sum(member.file_size for member in members) > size:
                raise UnclipError(f"{file} claims more bytes than its {_told(size)}; it is damaged")
            for member in members:
                if member.filename.endswith("data.pkl"):
                    _check_elements(file, archive.read(member), size)
    except (zipfile.BadZipFile, OSError) as error:
        raise UnclipError(f"{file} is damaged: {error}") from error


def _check_stream(file: Path) -> None:
    """The older stream: five pickles, then the storages. Their sizes are declared in the fourth pickle."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if not _starts_as_torch(stream.read(64)):
            raise UnclipError(
                f"{file} is no weights file: neither safetensors nor written by torch.save, and a plain pickle may run "
                "code when it is loaded, so it is refused"
            )
        stream.seek(0)
        try:
            for _ in range(4):
                _check_elements(file, stream, size)
        except (ValueError, EOFError, OSError) as error:
            raise UnclipError(f"{file} is damaged: {error}") from error


def _starts_as_torch(start: bytes) -> bool:
    try:
        first = next(
            (argument for _, argument, _ in pickletools.genops(start) if isinstance(argument, int) and argument > 255),
            0,
        )
    except ValueError:
        return False
    return first == _MAGIC


def _check_elements(file: Path, pickled: Any, size: int) -> None:
    """UnclipError when a pickle declares storages of more elements than the file has bytes. Only its opcodes are read;
    nothing is run.
    """
    sizes: dict[str, int] = {}
    try:
        for key, elements in _storages(pickled):
            sizes[key] = max(elements, sizes.get(key, 0))
    except ValueError as error:
        raise UnclipError(f"{file} is damaged: {error}") from error
    declared = sum(sizes.values())
    if declared > size:
        raise UnclipError(
            f"{file} is damaged: it declares {declared:,} numbers, and has {_told(size)}; nothing was read"
        )


def _storages(pickled: Any) -> Iterator[tuple[str, int]]:
    """(Key, elements) of each mention of a storage in a pickle, the tuple ('storage', class, key, place, elements): a
    storage that several tensors share is mentioned by each.
    """
    memo: dict[int, Any] = {}
    recent: list[Any] = []  # strings and numbers since the last mark
    number, before = 0, ""
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "MARK":
            recent = []
        elif name.endswith("PUT"):
            memo[int(argument or 0)] = recent[-1] if before.endswith("UNICODE") else None
        elif name.endswith("GET"):
            recent.append(memo.get(int(argument or 0)))
        elif name.endswith("UNICODE") or name.startswith(("BININT", "INT", "LONG")):
            recent.append(argument)
        elif name == "BINPERSID":
            texts = [one for one in recent if isinstance(one, str)]
            counts = [one for one in recent if isinstance(one, int)]
            number += 1
            yield texts[1] if len(texts) > 2 else f"#{number}", counts[-1] if counts else 0
        before = name


def _check_tensors(file: Path, stored: Any) -> None:
    """UnclipError when a tensor is larger than what is stored for it (a view with strides of 0 can claim any shape)."""
    for name, tensor in _walk(stored, ""):
        if tensor.layout is not torch.strided:
            raise UnclipError(f"{file} holds {name!r} as a {tensor.layout} tensor; only dense ones are read")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            claimed, stands = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
            raise UnclipError(
                f"{file} is damaged: {name!r} claims {list(tensor.shape)}, {_told(claimed)}, and "
                f"{_told(stands)} are stored"
            )


def _walk(stored: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(stored, Tensor):
        yield name, stored
    elif depth > 16:
        return
    elif isinstance(stored, Mapping):
        for key, value in stored.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(stored, (list, tuple)):
        for number, value in enumerate(stored):
            yield from _walk(value, f"{name}.{number}", depth + 1)


def _told(size: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError
