"""What was measured, as JSON, Markdown and one HTML page that needs nothing beside it."""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from unclip.errors import UnclipError

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT = "report.json"


@dataclass(frozen=True)
class Figure:
    """One number: `error` is its standard error or deviation, `reference` what real pictures get in the place of the
    samples.
    """

    key: str
    label: str
    value: float
    better: Literal["higher", "lower", ""] = ""
    error: float | None = None
    reference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """Pictures side by side with a line below; `names` says what each is to those who do not see it."""

    pictures: Sequence[Image]
    text: str = ""
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the report: words, a table, a picture that is written beside it as `<name>.png` and told by `alt` where
    it is not seen, small pictures.
    """

    title: str
    text: str = ""
    table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None
    picture: tuple[str, Image] | None = None
    cells: Sequence[Cell] = ()
    alt: str = ""


@dataclass
class Report:
    """`about` is what was measured and how; `values` goes into the JSON beside the figures."""

    title: str
    about: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Figure:
        return next(figure for figure in self.figures if figure.key == key)

    def write(self, folder: Path) -> None:
        """report.md, report.html, the pictures, and last report.json. UnclipError: they cannot be written."""
        for section in self.sections:
            if section.picture is not None:
                name, picture = section.picture
                write_file(folder / f"{name}.png", png(picture))
        write_file(folder / "report.md", self.markdown().encode("utf-8"))
        write_file(folder / "report.html", self.html().encode("utf-8"))
        write_file(folder / REPORT, self.json().encode("utf-8"))

    def json(self) -> str:
        body = {
            "title": self.title,
            "about": self.about,
            "figures": {one.key: _finite(asdict(one)) for one in self.figures},
            **self.values,
        }
        return json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def markdown(self) -> str:
        lines = [f"# {self.title}", ""]
        lines += [f"- {name}: {short(value)}" for name, value in self.about.items()]
        if self.figures:
            lines += ["", *_markdown_table(*self._table())]
        for section in self.sections:
            if section.cells and section.picture is None and section.table is None:
                continue  # pictures alone are for the page
            lines += ["", f"## {section.title}", ""]
            lines += [section.text, ""] if section.text else []
            lines += [*_markdown_table(*section.table), ""] if section.table else []
            if section.picture is not None:
                lines.append(f"![{section.alt or section.title}]({section.picture[0]}.png)")
        return "\n".join(lines).rstrip() + "\n"

    def html(self) -> str:
        from unclip.evaluation.page import to_html

        return to_html(self, self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        arrows = {"higher": "↑", "lower": "↓", "": ""}
        compared = any(one.reference is not None for one in self.figures)
        rows = [
            [
                f"{one.label} {arrows[one.better]}".strip(),
                number(one.value, one.error),
                *([number(one.reference)] if compared else []),
                one.note,
            ]
            for one in self.figures
        ]
        return ["figure", "value", *(["real pictures"] if compared else []), ""], rows


def number(value: float | None, error: float | None = None) -> str:
    """A figure as it is printed: four digits that count, and its error with two."""
    if value is None or not math.isfinite(value):
        return "" if value is None else "∞"
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text if error is None else f"{text} ± {error:.2g}"


def made_with(device: torch.device) -> dict[str, str]:
    """Versions and device, for `about`."""
    from unclip import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "CPU"
    return {"unclip": __version__, "torch": torch.__version__, "device": f"{device.type} ({name})"}


def png(picture: Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def write_file(file: Path, content: bytes) -> None:
    """Whole or not at all. UnclipError: it cannot be written."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UnclipError(f"cannot write {file}: {error.strerror or error}") from error


def plot(panels: int, draw: Callable[[list[Any]], None], *, columns: int = 3, width: float = 4.0) -> Image:
    """A picture of `panels` axes, which `draw` fills."""
    from matplotlib.figure import Figure as Canvas
    from PIL import Image

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    canvas = Canvas(figsize=(width * columns + 0.3, 3.1 * rows + 0.2), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[panels:]:
        empty.set_axis_off()
    for one in axes[:panels]:
        one.grid(alpha=0.3)
        one.tick_params(labelsize=8)
    draw(axes[:panels])
    stream = io.BytesIO()
    canvas.savefig(stream, dpi=100, format="png")
    stream.seek(0)
    picture = Image.open(stream).convert("RGB")
    return picture.quantize(128, dither=Image.Dither.NONE).convert("RGB")


def _finite(body: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in body.items()}


def short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    escaped = [[text(value).replace("|", "\\|") for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *escaped]]
