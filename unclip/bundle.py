"""Model folders on disk: `config.json` + safetensors a part, and `unclip.json` naming the parts of a whole
bundle.

Nothing is ever unpickled. Every file is written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from unclip.config import ConfigT, EpsilonStatistics, parse_config
from unclip.errors import UnclipError, UsageError, contents
from unclip.hub import CHECKPOINT, EVERYTHING, Remote, check_links, fetch, fetch_described, is_snapshot, parse_name

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
FORMAT = 1
MANIFEST = "unclip.json"
BUNDLED = "emoji"
STATISTICS = "analytic.json"
PARTS = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
PCA = "pca"
"""The part with the principal components of the CLIP's image embeddings, which a bundle may have."""
_MODELS = Path(__file__).parent / "models"
MAX_SHARD_BYTES = 15 * 2**20  # hosts that refuse files above 16 MiB still take every shard

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)


def save_part(
    folder: Path,
    kind: str,
    config: Any,
    state: Mapping[str, Tensor],
    extra: dict[str, Any] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write one part: `config.json` {"format", "kind", "config", …extra} and the weights, replacing the
    folder as a whole.
    """
    body = {"format": FORMAT, "kind": kind, "config": config.model_dump(mode="json"), **(extra or {})}
    with replacing(folder) as temporary:
        write_json(temporary / "config.json", body)
        save_weights(temporary, state, max_shard_bytes)


def load_part(folder: Path, kind: str, config_cls: type[ConfigT]) -> tuple[ConfigT, dict[str, Tensor]]:
    """Read one part -> (its validated configuration, float32 weights). UnclipError says what is missing or
    does not fit.
    """
    return read_config(folder, kind, config_cls), load_weights(folder)


def read_config(folder: Path, kind: str, config_cls: type[ConfigT]) -> ConfigT:
    """The validated configuration of a part, without its weights."""
    body = read_part_json(folder, kind)
    return parse_config(config_cls, body["config"], origin=str(folder / "config.json"))


def read_part_json(folder: Path, kind: str) -> dict[str, Any]:
    """The parsed `config.json` of a part, checked for format and kind."""
    file = folder / "config.json"
    if not file.is_file():
        raise UnclipError(f"{folder} is not a model part: config.json is missing (found: {contents(folder)})")
    body = read_json(file)
    if body.get("format") != FORMAT or "config" not in body:
        raise UnclipError(f"{file} has format {body.get('format')!r}, this version reads format {FORMAT}")
    if body.get("kind") != kind:
        raise UnclipError(f"{folder} holds a {body.get('kind')!r}, expected a {kind!r}")
    return body


def check_part_free(folder: Path, kind: str, overwrite: bool) -> None:
    """UnclipError when a part cannot take this place: it exists and `overwrite` is not set, or holds something else."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UnclipError(f"{folder} exists and is not a folder; name another")
    if any(folder.iterdir()):
        read_part_json(folder, kind)  # nothing but a part of this kind is ever replaced
        if not overwrite:
            raise UnclipError(f"{folder} exists; pass --overwrite to replace it, or name another folder")


def name_part(folder: Path, part: str, name: str) -> None:
    """Enter a part into the manifest of the bundle `folder`. UnclipError: it cannot be written."""
    manifest = read_manifest(folder)
    try:
        write_json(folder / MANIFEST, {**manifest, "parts": {**manifest["parts"], part: name}})
    except OSError as error:
        raise UnclipError(f"cannot write {folder / MANIFEST}: {error.strerror or error}") from error


def save_statistics(folder: Path, statistics: EpsilonStatistics) -> None:
    """Write Analytic-DPM's statistics beside a part's weights, which they belong to. UnclipError: not writable."""
    try:
        write_json(folder / STATISTICS, {"format": FORMAT, **statistics.model_dump(mode="json")})
    except OSError as error:
        raise UnclipError(f"cannot write {folder / STATISTICS}: {error.strerror or error}") from error


def read_statistics(folder: Path) -> EpsilonStatistics | None:
    """Analytic-DPM's statistics of a part, None where nobody measured them. UnclipError: damaged."""
    file = folder / STATISTICS
    if not file.is_file():
        return None
    body = read_json(file)
    if body.pop("format", None) != FORMAT:
        raise UnclipError(f"{file} is of another format; measure it again with `unclip statistics`")
    return parse_config(EpsilonStatistics, body, origin=str(file))


def load_network(build: Callable[[], ModuleT], state: Mapping[str, Tensor], folder: Path) -> ModuleT:
    """The network that `build` makes, with the tensors of `state` themselves for its weights: it is laid out on the
    meta device, so that its weights are in memory once, and nobody draws random ones first.

    Raises UnclipError as `load_strict`.
    """
    with torch.device("meta"):
        network = build()
    load_strict(network, state, folder, assign=True)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        network = build()  # it has tensors that are no weights, which its constructor computes
        load_strict(network, state, folder)
    return network


def load_strict(
    module: torch.nn.Module, state: Mapping[str, Tensor], folder: Path, *, assign: bool = False
) -> None:
    """Load weights that must fit exactly; UnclipError names the first keys that do not. With `assign` the tensors take
    the place of the module's own, and are not copied but where their type is another.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [f"missing {k}" for k in missing] + [f"unknown {k}" for k in unknown] + shapes
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UnclipError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:3])}{more}")
    if assign:
        state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    module.load_state_dict(dict(state), assign=assign)


def save_weights(folder: Path, state: Mapping[str, Tensor], max_shard_bytes: int | None = None) -> None:
    """Write `model.safetensors`, or numbered shards and an index when it would exceed `max_shard_bytes`, by default
    MAX_SHARD_BYTES.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes or MAX_SHARD_BYTES
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes it readable by its owner alone
    if plan.is_sharded:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename},
        )


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model*.safetensors` in float32, in memory of their own: a file that is changed while they are in
    use does not reach them. One shard after the other, so that no more than one is there twice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = read_shards(index) if index.is_file() else ["model.safetensors"]
    state: dict[str, Tensor] = {}
    for name in names:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise UnclipError(f"{folder} has no weights: {name} is missing")
        try:
            mapped = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UnclipError(f"{file} is damaged or not a safetensors file: {error}") from error
        for key in list(mapped):
            tensor = mapped.pop(key)
            state[key] = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    return state


def read_shards(index: Path) -> list[str]:
    """The files that an index of weights names. UnclipError: it names none."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UnclipError(f"{index} names no weights; expected {{'weight_map': {{tensor: file, …}}}}")
    return sorted(set(names.values()))


def resolve_model(
    name: str | Path,
    revision: str | None = None,
    parts: Callable[[Path], Sequence[str]] | None = None,
    upsamplers_alone: bool = False,
) -> Path:
    """The folder of a model: the bundled name, an existing folder, or a Hub id 'user/name' or 'user/name@revision',
    which is downloaded into the Hub's cache (unclip.hub.fetch).

    `parts` reads a bundle's folder without weights and names the parts that are wanted; those of others stay on the
    Hub. With `upsamplers_alone` the same holds for somebody else's checkpoint, which then becomes an upsampler's part
    where it is not converted as a whole yet.
    """
    text, folder = str(name), Path(name).expanduser()
    if not text.strip():
        raise UsageError(f"the model's name is empty; name {BUNDLED!r}, a folder, or a Hub id user/name")
    if text == BUNDLED and not (folder / MANIFEST).is_file():
        return _MODELS / BUNDLED
    hub = None if folder.exists() else parse_name(text, revision)
    if hub is not None:
        folder = fetch(hub, chosen=lambda described: _weights_of(described, parts, upsamplers_alone))
    elif not folder.is_dir() or not any(folder.iterdir()):
        return folder
    return folder if (folder / MANIFEST).is_file() else _converted(folder, upsamplers_alone)


def resolve_described(name: str | Path) -> tuple[Path, Remote | None]:
    """As `resolve_model`, but of a repository on the Hub only the descriptions are fetched, and what else lies there is
    told. Somebody else's checkpoint on the Hub comes as it is.
    """
    hub = None if Path(name).expanduser().exists() else parse_name(str(name))
    if hub is None:
        return resolve_model(name), None
    folder, remote = fetch_described(hub)
    return (resolve_model(name), None) if remote is None else (folder, remote)


def _weights_of(
    described: Path, parts: Callable[[Path], Sequence[str]] | None, upsamplers_alone: bool
) -> Sequence[str]:
    """Patterns of what is wanted beside descriptions: a bundle's parts, or of somebody else's checkpoint all, or what
    its upsamplers need.
    """
    if not (described / MANIFEST).is_file():
        found: Sequence[str] = _importers("upsampler_files")(described) if upsamplers_alone else ()
        return found or CHECKPOINT
    if parts is None:
        return EVERYTHING
    inside: dict[str, str] = read_manifest(described)["parts"]
    return [f"{inside[part]}/*.safetensors" for part in parts(described) if part in inside]


def _converted(folder: Path, upsamplers_alone: bool) -> Path:
    """A bundle made of somebody else's checkpoint, from the cache, or its upsampler; what is no such checkpoint comes
    back as it is.
    """
    found: Path = _importers("upsampler_of" if upsamplers_alone else "bundle_of")(folder)
    return found


def _importers(name: str) -> Callable[[Path], Any]:
    """They stand above this module, and take it as their ground; so they are named, not imported."""
    from pkgutil import resolve_name

    found: Callable[[Path], Any] = resolve_name(f"unclip.interop.direct:{name}")
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """`unclip.json` of a bundle; UnclipError when the folder is none or a part it names is missing."""
    if not folder.is_dir():
        raise UnclipError(f"no model folder at {folder}; name a folder that holds {MANIFEST}, or a Hub id user/name")
    file = folder / MANIFEST
    if not file.is_file():
        raise UnclipError(
            f"{folder} is not a bundle: {MANIFEST} is missing (found: {contents(folder)}); `unclip bundle` makes one"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise UnclipError(f"{file} has format {manifest.get('format')!r}, this version reads format {FORMAT}")
    parts = manifest.get("parts")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise UnclipError(f"{file} names no parts; expected {{'parts': {{'clip': 'clip', …}}}}")
    for part, name in parts.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
            raise UnclipError(f"{file} points part {part!r} outside the bundle ({name!r})")
        if not (folder / name).is_dir():
            there = ", ".join(p for p, n in parts.items() if (folder / n).is_dir()) or "none of them"
            raise UnclipError(f"{folder} is incomplete: part {part!r} is missing (present: {there})")
    if is_snapshot(folder):  # what was downloaded; a link in a folder of one's own is one's own wish
        check_links(folder, list(parts.values()))
    return manifest


def read_json(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnclipError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise UnclipError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(body, dict):
        raise UnclipError(f"{file} holds a {type(body).__name__}, expected a JSON object")
    return body


def write_json(file: Path, body: dict[str, Any]) -> None:
    """Atomically."""
    text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


class replacing:
    """Context manager: fill a temporary folder, which takes the place of `folder` when the block ends without
    an error. Raises UnclipError: the folder cannot be made, the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> Path:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder.parent))
        except OSError as error:
            raise UnclipError(f"cannot write to {self.folder.parent}: {error.strerror or error}") from error
        self.temporary.chmod(0o755)  # mkdtemp's 0700 would hide the model from other users
        return self.temporary

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            reason = _refused(error)
            if reason is not None:
                raise UnclipError(f"cannot write {self.folder}: {reason}") from cast(BaseException, error)
            return
        try:
            self._take_place()
        except OSError as failure:
            raise UnclipError(f"cannot write {self.folder}: {failure.strerror or failure}") from failure

    def _take_place(self) -> None:
        old = self.folder.with_name(f".tmp-old-{os.getpid()}")
        try:
            if self.folder.exists():
                self.folder.rename(old)
            self.temporary.rename(self.folder)
        except BaseException:  # interrupted between the two: what was there before stays
            if old.exists() and not self.folder.exists():
                old.rename(self.folder)
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _refused(error: object) -> str | None:
    """What the system says where it takes no more to write, for a full disk above all; safetensors has it in words."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _REFUSALS else None
    text = str(error)
    if type(error).__name__ != "SafetensorError" or "while serializing" not in text:
        return None
    found = re.search(r"I/O error: (.*?)(?: \(os error \d+\))?$", text)
    return found.group(1) if found else text
