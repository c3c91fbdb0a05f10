"""Which columns of a data set hold the image and the caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Columns:
    """Where an example keeps its image and captions."""

    images: tuple[str, ...]  # several where a tar mixes formats: each example fills one of them
    caption: tuple[str, ...]  # a path into nested columns
    has_key: bool
    decoded_by_datasets: tuple[str, ...]

    @property
    def top_level(self) -> list[str]:
        return list(dict.fromkeys([*self.images, self.caption[0], *(["__key__"] if self.has_key else [])]))

    def image_of(self, example: Mapping[str, Any]) -> Any:
        """What the image column holds: bytes, a path, a dictionary of both, or None."""
        return next((value for name in self.images if (value := example.get(name)) is not None), None)

    def captions(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The captions of an example; empty when there is none."""
        value: Any = example
        for name in self.caption:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, str):
            return (value,)
        if isinstance(value, (list, tuple)):
            return tuple(text for text in value if isinstance(text, str))
        return ()


def find_columns(
    dataset: Any, example: Mapping[str, Any], image: str | None, caption: str | None, source: str
) -> Columns:
    """Resolve the configured column names, or find the usual ones.

    `example` is one row, for data sets whose features are unknown. Raises UnclipError that lists the columns.
    """
    import datasets

    features: Mapping[str, Any] = dataset.features if dataset.features is not None else example
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images: tuple[str, ...] = (_pick(image, list(features), typed, _IMAGES, "image", source),)
    has_key = "__key__" in features
    if has_key and image is None:
        images += tuple(name for name in typed if name != images[0])
    texts = _paths(features)
    caption_name = _pick(caption, list(texts), [], _CAPTIONS, "caption", source)
    _check_text(texts[caption_name], caption_name, source)
    return Columns(
        images=images,
        caption=(caption_name,) if caption_name in features else tuple(caption_name.split(".")),
        has_key=has_key,
        decoded_by_datasets=tuple(name for name in images if name in typed),
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
    if isinstance(kind, str) and "string" not in kind and kind != "null":
        raise UnclipError(
            f"the caption column {name!r} of {source!r} holds {kind}, expected text or a list of texts"
        )
