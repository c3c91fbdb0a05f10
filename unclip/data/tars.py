"""Webdataset tars as img2dataset writes them: which of their fields are read, and as what, and reading them.

`datasets`' own reader ends with the first damaged sample of a tar, and its state cannot pass it. This one keeps what
lies before the damage and says in a last sample what happened; it goes through `IterableDataset.from_generator`.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

_IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
_TEXT_FIELDS = ("txt", "text", "transcript")
_MEMBERS_READ = 600
ERROR = "__error__"


def tar_features(files: list[Path], needed: tuple[str, ...] = ()) -> Any | None:
    """Features from the first members of the first tar that holds any: images, texts, and the json's texts and those
    of its values that are `needed` (`json.similarity`).

    Left alone, the `webdataset` builder takes the first five samples for the rule: it then fails on a tar that mixes
    jpg with png, and on a number in the json that was null so far. Here only images and texts are named.
    Returns `datasets.Features`, or None where no field is recognised.
    """
    import datasets

    fields: set[str] = set()
    texts: dict[str, Any] = {}
    for file in files:
        _peek(file, fields, texts)
        if fields:
            break
    for name in needed:
        first, _, inner = name.partition(".")
        if first == "json" and inner and inner not in texts:
            texts[inner] = datasets.Value("float64")
    features: dict[str, Any] = {}
    for name in sorted(fields):
        if name.lower().rpartition(".")[2] in _IMAGE_FIELDS:
            features[name] = datasets.Image(decode=False)
        elif name.lower() in _TEXT_FIELDS:
            features[name] = datasets.Value("binary")  # it may be no UTF-8
        elif name == "json" and texts:
            features[name] = texts
    if not features:
        return None
    keys = dict.fromkeys(("__key__", ERROR), datasets.Value("string"))
    return datasets.Features({**features, **keys})


def json_kinds(features: Any) -> dict[str, str]:
    """Of the json's columns in `tar_features`: 'text', 'texts' or 'number'."""
    import datasets

    kinds = {}
    for name, feature in features.get("json", {}).items():
        text = "texts" if isinstance(feature, datasets.List) else "text"
        kinds[name] = "number" if getattr(feature, "dtype", "") == "float64" else text
    return kinds


def read_tars(files: list[str], fields: tuple[str, ...], kinds: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The samples of tars, one after another: neighbouring members of one name. `fields` are read, of a json what
    `kinds` names; a field that a sample lacks is None. What cannot be read is a sample that has `__error__` alone.
    """
    for file in files:
        sample: dict[str, Any] = {}
        empty: dict[str, Any] = dict.fromkeys((*fields, ERROR))
        try:
            with tarfile.open(file) as tar:
                for member in tar:
                    key, field = _parts(member.name)
                    if not member.isfile() or not field:
                        continue
                    if sample and sample["__key__"] != key:
                        yield sample
                        sample = {}
                    sample = sample or {**empty, "__key__": key}
                    if field in fields:
                        _fill(sample, field, tar.extractfile(member), kinds)
                if sample:
                    yield sample
                    sample = {}
                _check_end(tar)
        except Exception as error:  # a damaged archive raises whatever its headers lead to
            # The sample that was begun may lack a member, so it goes with the rest.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            lost = f"the tar is damaged and its rest is lost: {reason}"
            yield {**empty, "__key__": Path(file).name, ERROR: lost}


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes a header that makes no sense, past the first, for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("it ends without the mark of an end")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _parts(name: str) -> tuple[str, str]:
    """`a/0001.seg.png` → (`a/0001`, `seg.png`), webdataset's rule."""
    path = PurePosixPath(name)
    stem, _, field = path.name.partition(".")
    return str(path.parent / stem), field


def _fill(sample: dict[str, Any], field: str, stream: Any, kinds: dict[str, str]) -> None:
    content = stream.read()
    if field != "json":
        image = field.lower().rpartition(".")[2] in _IMAGE_FIELDS
        sample[field] = {"bytes": content, "path": f"{sample['__key__']}.{field}"} if image else content
        return
    try:
        body = json.loads(content)
    except ValueError as error:  # UnicodeDecodeError is one
        sample[ERROR] = f"its json cannot be read: {error}"
        return
    if isinstance(body, Mapping):
        sample[field] = {name: _of_kind(body.get(name), kind) for name, kind in kinds.items()}


def _of_kind(value: Any, kind: str) -> Any:
    """A value that fits its column; None where it does not."""
    if kind == "number":
        return float(value) if isinstance(value, (int, float)) else None
    if kind == "text":
        return value if isinstance(value, str) else None
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _peek(file: Path, fields: set[str], texts: dict[str, Any]) -> None:
    """Add the extensions found in a tar to `fields`, and the json's keys that hold text to `texts`."""
    import datasets

    try:
        with tarfile.open(file) as tar:
            for member in islice(tar, _MEMBERS_READ):
                _, field = _parts(member.name)
                if not member.isfile() or not field:
                    continue
                fields.add(field)
                content = tar.extractfile(member) if field == "json" else None
                values = _object(content.read()) if content is not None else {}
                for key, value in values.items():
                    if isinstance(value, str):
                        texts[key] = datasets.Value("string")
                    elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
                        texts[key] = datasets.List(datasets.Value("string"))
    except (tarfile.TarError, OSError, EOFError):
        return  # what is wrong with the file is said when it is read


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
