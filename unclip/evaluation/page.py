"""A report as one HTML page that loads nothing: for wide and narrow screens, light and dark, and for screen readers."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from unclip.evaluation.report import Cell, Report, Section, png, short, text

if TYPE_CHECKING:
    from PIL.Image import Image

# Text on grounds in both schemes has a contrast of 7 or more (WCAG 2.2, 1.4.6); links take the browser's colours.
LIGHT = {"ground": "#ffffff", "text": "#1b1d20", "quiet": "#4d5359", "line": "#d5d9dd", "raised": "#f4f5f7"}
DARK = {"ground": "#15171a", "text": "#e8eaed", "quiet": "#b4bac1", "line": "#3a3f45", "raised": "#202429"}
_STYLE = """
:root { color-scheme: light dark; %s }
@media (prefers-color-scheme: dark) { :root { %s } }
* { box-sizing: border-box; }
body { font: 1rem/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 76rem;
  padding: 1rem clamp(1rem, 4vw, 2.5rem) 4rem;
  color: var(--text); background: var(--ground); overflow-wrap: break-word; }
h1 { font-size: clamp(1.35rem, 1rem + 2vw, 1.9rem); line-height: 1.25; margin: 1rem 0; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1rem 0; padding: 0; list-style: none;
  font-size: .9rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .15rem 1.2rem; margin: .6rem 0; }
dt, .quiet, figcaption { color: var(--quiet); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--quiet); } details dl { font-size: .85rem; }
.scroll { overflow-x: auto; max-width: 100%%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } tbody th { font-weight: 400; } th:first-child, .words { text-align: left; }
thead th { background: var(--raised); } td { white-space: nowrap; }
td.words { white-space: normal; color: var(--quiet); font-size: .88em; min-width: 14rem; }
.dense th, .dense td { padding: .3rem .45rem; font-size: .88rem; } figure { margin: 0; } img { display: block; }
.plot img { max-width: 100%%; height: auto; background: #ffffff; border: 1px solid var(--line); }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(var(--cell), 100%%), 1fr)); gap: 1rem .8rem;
  margin: .8rem 0; padding: 0; list-style: none; }
.cells .row { display: flex; gap: 3px; }
.cells img { width: 96px; max-width: %s; height: auto; aspect-ratio: 1; image-rendering: pixelated;
  border: 1px solid var(--line); flex: 0 1 96px; min-width: 0; }
.cells figcaption { font-size: .8rem; line-height: 1.35; margin-top: .25rem; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .45rem; }
  th, td { padding: .3rem .5rem; } .wide img { max-width: none; width: 52rem; }
}
@media print { details { display: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""
_WIDE = 900  # pixels: a plot of several panels, which a narrow screen scrolls sideways instead of shrinking
_MANY = 8  # columns
_LONG = 90  # characters: longer facts are folded away


def to_html(report: Report, table: tuple[Sequence[str], Sequence[Sequence[Any]]]) -> str:
    """The page; `table` is that of the figures."""
    title = html.escape(report.title)
    style = _STYLE % (_variables(LIGHT), _variables(DARK), "100%")
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{style}</style>'
    )
    parts: list[tuple[str, str]] = []
    if report.figures:
        arrows = '<p class="quiet">↑ higher is better, ↓ lower is better.</p>'
        parts.append(("Figures", arrows + _table(*table, "Figures")))
    parts += [(section.title, _section(section)) for section in report.sections]
    names = list(_ids(name for name, _ in parts))
    body = [f"<header><h1>{title}</h1>", _about(report.about)]
    if len(parts) > 2:
        links = "".join(
            f'<li><a href="#{one}">{html.escape(name)}</a></li>' for one, (name, _) in zip(names, parts, strict=True)
        )
        body.append(f'<nav aria-label="Contents"><ul>{links}</ul></nav>')
    body.append("</header>\n<main>")
    for one, (name, content) in zip(names, parts, strict=True):
        heading = f'<h2 id="{one}">{html.escape(name)}</h2>'
        body.append(f'<section aria-labelledby="{one}">\n{heading}\n{content}\n</section>')
    page = "\n".join([*body, "</main>"])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{page}\n</body>\n</html>\n'


def data_url(picture: Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _ids(titles: Iterable[str]) -> Iterable[str]:
    """What names each section in links, once."""
    seen: dict[str, int] = {}
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        seen[name] = seen.get(name, 0) + 1
        yield f"part-{name}" + (f"-{seen[name]}" if seen[name] > 1 else "")


def _about(facts: dict[str, Any]) -> str:
    """What was measured; long settings folded away."""
    told = {name: _plainly(value) for name, value in facts.items()}
    lists = [
        "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in told.items()
            if (len(value) > _LONG) == folded
        )
        for folded in (False, True)
    ]
    whole = f"<dl>{lists[0]}</dl>" if lists[0] else ""
    if lists[1]:
        whole += f"\n<details><summary>All settings</summary><dl>{lists[1]}</dl></details>"
    return whole


def _plainly(value: Any) -> str:
    """A mapping of single values as words, and not as JSON."""
    if isinstance(value, dict) and value and not any(isinstance(one, (dict, list, tuple)) for one in value.values()):
        return ", ".join(f"{name} {one if isinstance(one, str) else short(one)}" for name, one in value.items())
    return short(value)


def _section(section: Section) -> str:
    parts = [f"<p>{html.escape(section.text)}</p>"] if section.text else []
    if section.table:
        parts.append(_table(*section.table, section.title))
    if section.cells:  # which the picture beside the page repeats
        count = max(len(cell.pictures) for cell in section.cells)
        cells = "".join(f"<li>{_cell(cell)}</li>" for cell in section.cells)
        parts.append(f'<ul class="cells" style="--cell: {count * 99}px">{cells}</ul>')
    elif section.picture is not None:
        picture = section.picture[1]
        alt = html.escape(section.alt or section.title)
        size = f'width="{picture.width}" height="{picture.height}"'
        image = f'<img alt="{alt}" {size} src="{data_url(picture)}">'
        kind = "plot wide" if picture.width > _WIDE else "plot"
        parts.append(f'{_scrolled(section.title)}<figure class="{kind}">{image}</figure></div>')
    return "\n".join(parts)


def _scrolled(label: str) -> str:
    """The beginning of what scrolls sideways, by keys too."""
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{html.escape(label)}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], label: str) -> str:
    words = [i > 0 and name == "" for i, name in enumerate(head)]
    top = "".join(
        f'<th scope="col"{_class(words[i])}>{html.escape(name) or "note"}</th>' if i or name else "<td></td>"
        for i, name in enumerate(head)
    )
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{_class(words[i])}>{html.escape(text(value))}</td>" for i, value in enumerate(rest, 1))
        lines.append(f'<tr><th scope="row">{html.escape(text(first))}</th>{cells}</tr>')
    body = "\n".join(lines)
    kind = ' class="dense"' if len(head) > _MANY else ""
    return f"{_scrolled(label)}<table{kind}><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _class(words: bool) -> str:
    return ' class="words"' if words else ""


def _cell(cell: Cell) -> str:
    pictures = []
    for number, picture in enumerate(cell.pictures):
        name = cell.names[number] if number < len(cell.names) else f"picture {number + 1}"
        alt = html.escape(f"{name}: {cell.text}" if cell.text else name)
        size = f'width="{picture.width}" height="{picture.height}"'
        pictures.append(f'<img alt="{alt}" {size} src="{data_url(picture)}">')
    caption = f"<figcaption>{html.escape(cell.text)}</figcaption>" if cell.text else ""
    return f'<figure><div class="row">{"".join(pictures)}</div>{caption}</figure>'
