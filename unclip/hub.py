"""The Hugging Face Hub: what is fetched, how large it is, and from which revision. `client` is the one door to it.

`from_pretrained("user/model")` and everything else that takes a model's name come here. Sizes are told before a byte of
weights moves, what the cache holds is not fetched again, and with HF_HUB_OFFLINE=1 nothing but the cache is asked.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unclip.errors import UnclipError, UsageError

DESCRIPTIONS = ("*.json", "*.txt.gz", "*.md")
"""What tells of a model and is small."""
EVERYTHING = (*DESCRIPTIONS, "*.safetensors")
CHECKPOINT = (*EVERYTHING, "*.txt", "*.gz")
"""Of somebody else's checkpoint: nothing pickled, no pictures."""
Tell = Callable[[str], None]


class HubName(NamedTuple):
    """A repository and the revision that is asked of it."""

    repo: str
    revision: str | None


class Remote(NamedTuple):
    """What the Hub holds of a repository at one commit: bytes by file."""

    name: HubName
    sha: str
    sizes: dict[str, int]


def client() -> Any:
    """The Hub's own client."""
    from huggingface_hub import HfApi

    return HfApi()


def parse_name(text: str, revision: str | None = None) -> HubName | None:
    """'user/name' or 'user/name@revision' -> repository and revision; None for what can only be a path.

    UsageError: two revisions that are not the same.
    """
    repo, at, asked = text.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo) or (at and not asked):
        return None
    if asked and revision is not None and asked != revision:
        raise UsageError(f"{text!r} asks for the revision {asked!r}, and revision is {revision!r}; give one of them")
    return HubName(repo, asked or revision)


def fetch(
    name: HubName,
    patterns: Sequence[str] = EVERYTHING,
    chosen: Callable[[Path], Sequence[str]] | None = None,
    tell: Tell | None = None,
) -> Path:
    """The folder of a repository's snapshot in the Hub's cache, with all files of these patterns in it.

    With `chosen` only the descriptions come first; it reads them in their folder and names the patterns of the weights
    that are wanted beside. `tell` hears what will be fetched and how large it is, by default on stderr.
    Raises UnclipError: no such repository or revision, not reachable and not in the cache, no room on the disk.
    """
    tell = aloud if tell is None else tell
    found = _listed(name, tell)
    if isinstance(found, Path):
        return found
    if chosen is None:
        return _download(name, found.sha, matching(found.sizes, patterns), tell)
    folder = _download(name, found.sha, matching(found.sizes, DESCRIPTIONS), None)
    wanted = matching(found.sizes, list(chosen(folder)))
    return _download(name, found.sha, wanted, tell) if wanted else folder


def fetch_described(name: HubName, tell: Tell | None = None) -> tuple[Path, Remote | None]:
    """The folder of a snapshot with its descriptions alone, and what lies on the Hub; None where the cache is all that
    there is. Raises as `fetch`.
    """
    found = _listed(name, aloud if tell is None else tell)
    if isinstance(found, Path):
        return found, None
    return _download(name, found.sha, matching(found.sizes, DESCRIPTIONS), None), found


def read_shapes(remote: Remote, file: str) -> list[tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file on the Hub, of which only the header is fetched. Raises UnclipError:
    not reachable, or no such file.
    """
    try:
        told = client().parse_safetensors_file_metadata(remote.name.repo, file, revision=remote.sha)
    except Exception as error:  # the Hub's client raises many kinds
        raise UnclipError(f"the header of {file} in {remote.name.repo} cannot be read: {reason_of(error)}") from error
    return [tuple(tensor.shape) for tensor in told.tensors.values()]


def is_snapshot(folder: Path) -> bool:
    """Whether a folder lies in the Hub's cache, where it was not put by the user's own hand."""
    root = folder.resolve()
    return root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()


def check_links(folder: Path, names: Sequence[str]) -> None:
    """UnclipError when anything in these sub-folders, or in the folder itself, is a link that leaves the folder. The
    Hub's cache links its snapshots to blobs beside them, which are its own.
    """
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if is_snapshot(root) else [])]
    inside = [path for name in names for path in ((root / name), *(root / name).parents, *(root / name).rglob("*"))]
    for path in (*root.iterdir(), *inside):
        if path.is_symlink() and not any(base in path.resolve().parents for base in allowed) and root in path.parents:
            raise UnclipError(
                f"{path} is a link to {path.resolve()}, outside the model's folder; put the file itself there"
            )


def told_size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


# ---- inside --------------------------------------------------------------------------------------------


def _listed(name: HubName, tell: Tell) -> Remote | Path:
    """What the Hub holds; the cached snapshot where the Hub is not asked or not reached."""
    if _offline():
        return _cached(name, "HF_HUB_OFFLINE is set")
    try:
        found = client().model_info(name.repo, revision=name.revision, files_metadata=True)
    except Exception as error:  # the Hub's client raises many kinds
        if _is_answer(error):
            raise UnclipError(
                f"no folder {name.repo!r} here, and the Hub gave no model of that name"
                f"{f' at {name.revision!r}' if name.revision else ''}: {answer_of(error)}"
            ) from error
        folder = _cached(name, f"the Hub cannot be reached ({reason_of(error)})")
        tell(f"the Hub cannot be reached; {name.repo} is taken from the cache, revision {folder.name[:12]}")
        return folder
    return Remote(name, str(found.sha), {file.rfilename: file.size or 0 for file in found.siblings or ()})


def _download(name: HubName, sha: str, wanted: dict[str, int], tell: Tell | None) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    missing = {
        file: size
        for file, size in wanted.items()
        if not isinstance(try_to_load_from_cache(name.repo, file, revision=sha), str)
    }
    total = sum(missing.values())
    cache = Path(constants.HF_HUB_CACHE)
    if missing and tell is not None:
        tell(f"downloading {name.repo}, revision {sha[:12]}: {len(missing)} files, {told_size(total)}, into {cache}")
    room = shutil.disk_usage(_existing(cache)).free
    if total > room:
        raise UnclipError(
            f"{name.repo} needs {told_size(total)}, and {cache} has room for {told_size(room)}; free some, "
            "or set HF_HOME"
        )
    try:
        # The revision as it was asked for, so that the cache remembers under that name what it means.
        return Path(client().snapshot_download(name.repo, revision=name.revision, allow_patterns=sorted(wanted)))
    except Exception as error:  # as above
        again = "" if _is_answer(error) else "; run it again to continue"
        raise UnclipError(f"{name.repo} could not be downloaded: {answer_of(error)}{again}") from error


def _cached(name: HubName, why: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # No pattern, no file that must be there: a part of a model is enough for some, and is checked where it is read.
        return Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]))
    except Exception as error:  # as above
        revision = f" at revision {name.revision!r}" if name.revision else ""
        raise UnclipError(
            f"no folder {name.repo!r} here, {why}, and the Hub's cache holds no model of that name{revision}"
        ) from error


def matching(sizes: dict[str, int], patterns: Sequence[str]) -> dict[str, int]:
    """The files of these patterns and their sizes; of several variants of the same weights the whole one."""
    from huggingface_hub.utils import filter_repo_objects

    found = set(filter_repo_objects(sizes, allow_patterns=list(patterns)))
    return {name: sizes[name] for name in sizes if name in found and not _has_whole(name, found)}


def _has_whole(name: str, names: set[str]) -> bool:
    return ".fp16." in name and name.replace(".fp16.", ".") in names


def _is_answer(error: Exception) -> bool:
    """Whether the Hub itself said no, where the cache is no help; else it was not reached."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return _status(error) < 500
    return isinstance(error, HFValidationError)


def _status(error: Exception) -> int:
    """Of the Hub's answer; 404 for one that tells none, 0 for what is no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return 0
    return getattr(getattr(error, "response", None), "status_code", None) or 404


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _existing(folder: Path) -> Path:
    """The folder, or what of its parents is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def aloud(sentence: str) -> None:
    print(f"unclip: {sentence}", file=sys.stderr)


def answer_of(error: Exception) -> str:
    """Why the Hub's client gave nothing, and what to do where that is known. Libraries that call the client raise
    errors of their own; then the Hub's refusal is looked for in what these came from.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    refusals = (GatedRepoError, RepositoryNotFoundError)
    error = next((one for one in _origins(error) if isinstance(one, refusals) or _status(one) in (401, 403)), error)
    if isinstance(error, GatedRepoError):
        return "it is gated; accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private; log in with `hf auth login` or set HF_TOKEN if it is"
    if _status(error) in (401, 403):
        return "the token gives no access to it; log in with `hf auth login`, or check HF_TOKEN and its permissions"
    return reason_of(error)


def _origins(error: Exception) -> Iterator[Exception]:
    """An error, what it was made of, and so on."""
    found: BaseException | None = error
    while isinstance(found, Exception):
        yield found
        found = found.__cause__ or found.__context__


def reason_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
