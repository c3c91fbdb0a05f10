"""Which columns of a data set hold the image and the caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unclip.config import DataConfig
from unclip.errors import UnclipError

_IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes", "image_path")
# Several captions of a picture are worth more than one of them, hence the plural first.
_CAPTIONS = (
    "captions",
    "json.captions",
    "caption",
    "text",
    "txt",
    "prompt",
    "json.caption",
    "name",
    "description",
    "alt_text",
    "title",
)


_KEYS = ("key", "json.key", "__key__", "sample_id")


@dataclass(frozen=True)
class Columns:
    """Where an example keeps its image, captions, key and score."""

    images: tuple[str, ...]  # several where a tar mixes formats: each example fills one of them
    caption: tuple[str, ...]  # a path into nested columns
    key: tuple[str, ...] | None
    score: tuple[str, ...] | None
    others: tuple[str, ...]  # __key__ and __error__, where there are such
    decoded_by_datasets: tuple[str, ...]
    low: tuple[str, ...] | None = None  # of the low-resolution picture

    @property
    def top_level(self) -> list[str]:
        nested = [path[0] for path in (self.caption, self.key, self.score, self.low) if path is not None]
        return list(dict.fromkeys([*self.images, *nested, *self.others]))

    def image_of(self, example: Mapping[str, Any]) -> Any:
        """What the image column holds: bytes, a path, a dictionary of both, or None."""
        return next((value for name in self.images if (value := example.get(name)) is not None), None)

    def low_of(self, example: Mapping[str, Any]) -> Any:
        """What the column of low-resolution pictures holds, as `image_of`."""
        return None if self.low is None else _at(example, self.low)

    def captions(self, example: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """The captions of an example, none where it has none, and how many were no UTF-8 text."""
        value = _at(example, self.caption)
        texts, undecodable = [], 0
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, bytes):
                try:
                    text = text.decode("utf-8")
                except UnicodeDecodeError:
                    undecodable += 1
            if isinstance(text, str):
                texts.append(text)
        return tuple(texts), undecodable

    def key_of(self, example: Mapping[str, Any]) -> str | None:
        value = None if self.key is None else _at(example, self.key)
        return None if value is None else str(value)

    def score_of(self, example: Mapping[str, Any]) -> float | None:
        value = None if self.score is None else _at(example, self.score)
        try:
            return None if value is None else float(value)
        except (TypeError, ValueError):
            return None


def _at(example: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = example
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def find_columns(dataset: Any, example: Mapping[str, Any], config: DataConfig) -> Columns:
    """Resolve the configured column names, or find the usual ones.

    `example` is one row, for data sets whose features are unknown. Raises UnclipError that lists the columns.
    """
    import datasets

    source = config.source
    features: Mapping[str, Any] = dataset.features if dataset.features is not None else example
    low = config.low_column
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    typed = [name for name in pictures if name != low]
    images: tuple[str, ...] = (_pick(config.image_column, list(features), typed, _IMAGES, "image", source),)
    if "__key__" in features and config.image_column is None:
        images += tuple(name for name in typed if name != images[0])
    texts = _paths(features)
    caption = _pick(config.caption_column, list(texts), [], _CAPTIONS, "caption", source)
    _check_text(texts[caption], caption, source)
    score, key = config.filter.score_column, config.key_column
    if score is not None:
        _pick(score, list(texts), [], (), "score", source)
    if low is not None:
        _pick(low, [*texts, *pictures], [], (), "low-resolution picture", source)
    if key is not None:
        _pick(key, list(texts), [], (), "key", source)
    else:
        key = next((name for name in _KEYS if name in texts), None)

    def path(name: str | None) -> tuple[str, ...] | None:
        return None if name is None else (name,) if name in features else tuple(name.split("."))

    return Columns(
        images=images,
        caption=path(caption) or (),
        key=path(key),
        score=path(score),
        others=tuple(name for name in ("__key__", "__error__") if name in features),
        decoded_by_datasets=tuple(name for name in (*images, low) if name in pictures),
        low=path(low),
    )


def _paths(features: Mapping[str, Any]) -> dict[str, Any]:
    """Column names, and those one level down (`json.caption`), with their features or example values."""
    paths = dict(features)
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            paths.update({f"{name}.{inner}": value for inner, value in feature.items()})
    return paths


def _pick(
    wanted: str | None, columns: list[str], typed: list[str], usual: tuple[str, ...], what: str, source: str
) -> str:
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise UnclipError(
            f"the data set {source!r} has no column {wanted!r} for the {what}; "
            f"columns found: {_list(columns)}"
        )
    lowered = {name.lower(): name for name in reversed(columns)}
    for name in usual:
        if name in lowered and (not typed or lowered[name] in typed):
            return lowered[name]
    if typed:
        return typed[0]
    raise UnclipError(
        f"the data set {source!r} has no {what} column under a usual name; columns found: {_list(columns)}; "
        f"name one with data.{what}_column"
    )


def _list(columns: list[str]) -> str:
    return ", ".join(columns) or "none"


def _check_text(feature: Any, name: str, source: str) -> None:
    """A caption column of numbers would make every sample look broken; say so at once."""
    inner = getattr(feature, "feature", feature)  # of a list
    kind = getattr(inner, "dtype", None)
    if isinstance(kind, str) and "string" not in kind and kind not in ("null", "binary", "large_binary"):
        raise UnclipError(
            f"the caption column {name!r} of {source!r} holds {kind}, expected text or a list of texts"
        )
