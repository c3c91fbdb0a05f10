"""Webdataset tars as img2dataset writes them: which of their fields are read, and as what."""

from __future__ import annotations

import json
import tarfile
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

_IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
_TEXT_FIELDS = ("txt", "text", "transcript")  # those that `datasets` decodes to a string
_MEMBERS_READ = 600


def tar_features(files: list[Path]) -> Any | None:
    """Features for the `webdataset` builder from the first members of the first tar that holds any.

    Left alone, the builder takes the first five samples for the rule: it then fails on a tar that mixes jpg
    with png, and on a number in the json that was null so far. Here only images and texts are named.
    Returns `datasets.Features`, or None where no field is recognised.
    """
    import datasets

    fields: set[str] = set()
    texts: dict[str, Any] = {}
    for file in files:
        _peek(file, fields, texts)
        if fields:
            break
    features: dict[str, Any] = {}
    for name in sorted(fields):
        if name.lower().rpartition(".")[2] in _IMAGE_FIELDS:
            features[name] = datasets.Image(decode=False)
        elif name.lower() in _TEXT_FIELDS:
            features[name] = datasets.Value("string")
        elif name == "json" and texts:
            features[name] = texts
    if not features:
        return None
    keys = dict.fromkeys(("__key__", "__url__"), datasets.Value("string"))
    return datasets.Features({**features, **keys})


def _peek(file: Path, fields: set[str], texts: dict[str, Any]) -> None:
    """Add the extensions found in a tar to `fields`, and the json's keys that hold text to `texts`."""
    import datasets

    try:
        with tarfile.open(file) as tar:
            for member in islice(tar, _MEMBERS_READ):
                _, _, field = PurePosixPath(member.name).name.partition(".")
                if not member.isfile() or not field:
                    continue
                fields.add(field)
                content = tar.extractfile(member) if field == "json" else None
                values = json.load(content) if content is not None else {}
                for key, value in values.items() if isinstance(values, dict) else ():
                    if isinstance(value, str):
                        texts[key] = datasets.Value("string")
                    elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
                        texts[key] = datasets.List(datasets.Value("string"))
    except (tarfile.TarError, OSError, ValueError):
        return  # what is wrong with the file is said when it is read
