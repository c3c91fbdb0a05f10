"""Where a run's weights come from (`init_from`): a bundle's part, another run's model, somebody else's checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unclip.bundle import BUNDLED, MANIFEST, read_json, read_manifest, resolve_model
from unclip.config import Config
from unclip.errors import UnclipError
from unclip.hub import parse_name
from unclip.training.distributed import Distributed

Reader = Callable[[Path], tuple[Any, dict[str, Tensor]]]
"""A folder -> the configuration that it describes and its weights."""


@dataclass(frozen=True)
class Start:
    """A trained network that a run starts from."""

    folder: Path
    config: Any
    state: dict[str, Tensor]


def open_start(
    name: str,
    kind: str,
    read: Reader,
    *,
    foreign: Reader | None = None,
    parts: Sequence[str] | None = None,
    wanted: Callable[[Path], bool] = lambda _folder: True,
    weights: bool = True,
) -> Start:
    """Read what `init_from` names: the folder of a part, of a run, of a bundle ('emoji' is the bundled one), a
    Hub id or, with `foreign`, of a checkpoint in diffusers' layout.

    `kind` is the part's kind and `read` its reader; of a bundle the first of `parts` is taken that is `wanted`. A
    bundle on the Hub gives these parts' weights, or with `weights` false none.
    Raises UnclipError: no such folder, or one that holds no such part.
    """
    folder = Path(name).expanduser()
    if name == BUNDLED or (not folder.exists() and parse_name(name) is not None):
        folder = resolve_model(name, parts=lambda _described: (parts or (kind,)) if weights else ())
    if not folder.is_dir():
        raise UnclipError(
            f"init_from names {name!r}, and there is no such folder; name a bundle, a run, the folder of a {kind}, a "
            f"Hub id user/name, or {BUNDLED!r} for the bundled model"
        )
    if (folder / MANIFEST).is_file():
        folder = _of_bundle(folder, kind, parts or (kind,), wanted)
    elif not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if _is_foreign(folder):
        if foreign is None:
            raise UnclipError(f"{folder} is a checkpoint of diffusers; it can be read by the train_*.py scripts alone")
        return Start(folder, *foreign(folder))
    if not (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        raise UnclipError(f"{folder} is a run that has not written its model yet; let it come to its end first")
    return Start(folder, *read(folder))


def _of_bundle(folder: Path, kind: str, parts: Sequence[str], wanted: Callable[[Path], bool]) -> Path:
    named: dict[str, str] = read_manifest(folder)["parts"]
    there = [folder / named[part] for part in parts if part in named]
    for candidate in there:
        if wanted(candidate):
            return candidate
    if there:
        raise UnclipError(f"none of the {kind}s in {folder} has the sizes of this run ({', '.join(parts)})")
    raise UnclipError(f"init_from names the bundle {folder}, which has no {kind}; it has {', '.join(named)}")


def _is_foreign(folder: Path) -> bool:
    """Whether diffusers wrote it: a pipeline's folder, or one of its models."""
    if (folder / "model_index.json").is_file():
        return True
    file = folder / "config.json"
    return file.is_file() and "_class_name" in read_json(file)


def inherited(start: Start, given: Config) -> dict[str, Any]:
    """A model's configuration as a dictionary: what was written down in `given`, and all else as in the checkpoint.

    Sections with a `kind` of their own are taken whole where the kinds differ.
    """
    return _laid_over(start.config.model_dump(), given.model_dump(exclude_unset=True))


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    if "kind" in above and above["kind"] != below.get("kind"):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        other = below.get(key)
        both = isinstance(value, Mapping) and isinstance(other, Mapping)
        merged[key] = _laid_over(other, value) if both else value  # type: ignore[arg-type]
    return merged


def carry_over(
    network: nn.Module, start: Start, kind: str, *, fresh: Iterable[str] = (), left: Iterable[str] = ()
) -> None:
    """Load the weights of `start`. Those of the network named in `fresh` keep their values, those of `start` named in
    `left` are not wanted; everything else must fit.

    Raises UnclipError, naming the first tensors that do not, with both shapes.
    """
    own = network.state_dict()
    kept, dropped = set(fresh), set(left)
    state = {name: value for name, value in start.state.items() if name not in kept | dropped}
    problems = [
        f"{name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    problems += [f"{name} is missing there" for name in own if name not in state and name not in kept]
    problems += [f"there is no {name} here" for name in state if name not in own]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UnclipError(
            f"the weights of {start.folder} do not fit this {kind}: {'; '.join(problems[:3])}{more}. What the "
            "section model leaves out is as in the checkpoint, so leave its sizes out"
        )
    network.load_state_dict({**{name: own[name] for name in kept if name in own}, **state})


def tell(note: str | None, distributed: Distributed) -> None:
    """One line on stderr, by the first process."""
    if note and distributed.is_main:
        print(f"note: {note}", file=sys.stderr, flush=True)
