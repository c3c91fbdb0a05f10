"""What was measured, as JSON, Markdown and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
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
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { color: #555; font-size: .9em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dt { color: #555; } 
dd { margin: 0; overflow-wrap: anywhere; }
.cells { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; width: min-content; font-size: .75rem; }
figure div { display: flex; gap: 2px; }
figure img { width: 96px; height: 96px; border: 1px solid #eee; }
img.plot { max-width: 100%; }
"""


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
    """Pictures side by side with a line below."""

    pictures: Sequence[Image]
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report: words, a table, a picture that is written beside it as `<name>.png`, small pictures."""

    title: str
    text: str = ""
    table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None
    picture: tuple[str, Image] | None = None
    cells: Sequence[Cell] = ()


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
        lines += [f"- {name}: {_short(value)}" for name, value in self.about.items()]
        if self.figures:
            lines += ["", *_markdown_table(*self._table())]
        for section in self.sections:
            if section.cells and section.picture is None and section.table is None:
                continue  # pictures alone are for the page
            lines += ["", f"## {section.title}", ""]
            lines += [section.text, ""] if section.text else []
            lines += [*_markdown_table(*section.table), ""] if section.table else []
            if section.picture is not None:
                lines.append(f"![{section.title}]({section.picture[0]}.png)")
        return "\n".join(lines).rstrip() + "\n"

    def html(self) -> str:
        about = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(_short(value))}</dd>" for name, value in self.about.items()
        )
        body = [f"<h1>{html.escape(self.title)}</h1>", f"<dl>{about}</dl>"]
        if self.figures:
            body += ["<h2>Figures</h2>", _html_table(*self._table())]
        for section in self.sections:
            body.append(f"<h2>{html.escape(section.title)}</h2>")
            if section.text:
                body.append(f"<p>{html.escape(section.text)}</p>")
            if section.table:
                body.append(_html_table(*section.table))
            if section.picture is not None:
                body.append(f'<img class="plot" alt="{html.escape(section.title)}" src="{_data(section.picture[1])}">')
            if section.cells:
                body.append(f'<div class="cells">{"".join(map(_html_cell, section.cells))}</div>')
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
        page = "\n".join(body)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{page}\n</body></html>\n'

    def _table(self) -> tuple[list[str], list[list[str]]]:
        arrows = {"higher": "↑", "lower": "↓", "": ""}
        rows = [
            [f"{one.label} {arrows[one.better]}".strip(), number(one.value, one.error), number(one.reference), one.note]
            for one in self.figures
        ]
        return ["figure", "value", "real pictures", ""], rows


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


def need_matplotlib() -> None:
    """UnclipError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnclipError(
            "drawing curves needs the package matplotlib; install it with: pip install 'unclip[eval]'"
        ) from error


def plot(panels: int, draw: Callable[[list[Any]], None], *, columns: int = 3, width: float = 4.0) -> Image:
    """A picture of `panels` axes, which `draw` fills."""
    from matplotlib.figure import Figure as Canvas
    from PIL import Image

    need_matplotlib()
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


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    escaped = [[_text(value).replace("|", "\\|") for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *escaped]]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = []
    for row in rows:
        kinds = ['class="text"' if name == "" else "" for name in head]
        cells = "".join(f"<td {kinds[i]}>{html.escape(_text(value))}</td>" for i, value in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _html_cell(cell: Cell) -> str:
    pictures = "".join(f'<img alt="" src="{_data(picture)}">' for picture in cell.pictures)
    return f"<figure><div>{pictures}</div>{html.escape(cell.text)}</figure>"


def _data(picture: Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
