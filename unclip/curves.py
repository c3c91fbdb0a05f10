"""Training curves as a picture: what `unclip plot` draws."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from unclip.errors import UnclipError, UsageError
from unclip.runs import METRICS, read_rows

_COLUMNS = 3
_QUARTERS = ("least noise", "", "", "most noise")
_COSINES = {
    "cos_prediction_real": "prediction, real",
    "cos_text_real": "text, real",
    "cos_text_prediction": "text, prediction",
    "cos_prediction_unrelated": "prediction, unrelated",
    "cos_real_unrelated": "real, unrelated",
    "cos_text_unrelated": "text, unrelated",
}
_TITLES = {
    "images_per_second": "images/s",
    "mfu": "MFU",
    "memory_gib": "memory, GiB",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
}
_LAST = (*("lr", "grad_norm", "param_norm"), *("images_per_second", "mfu", "memory_gib"))
_VALIDATION = "validation_"
_RUN_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curves:
    """A run's metrics: for each key the steps at which it was told, and its values."""

    path: Path
    points: dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Panel:
    title: str
    keys: tuple[str, ...]


def read_curves(run: Path) -> Curves:
    """The curves of a run folder or of a `metrics.jsonl`. UnclipError: neither is there, or no line in it."""
    file = run / METRICS if run.is_dir() else run
    if not file.is_file():
        what = f"{run} is no run: it has no {METRICS}" if run.is_dir() else f"there is no run {run}"
        raise UnclipError(f"{what}; `unclip runs FOLDER` lists the runs in a folder")
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_rows(file):
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = points.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    if not points and file.name != METRICS and file.stat().st_size:
        raise UnclipError(f"{file} is no {METRICS}; name a run's folder, or the {METRICS} in it")
    if not points:
        raise UnclipError(f"{file} holds no metrics yet; the first are written at step train.log_every")
    return Curves((run if run.is_dir() else run.parent).absolute(), points)


def draw_curves(
    curves: Sequence[Curves], out: Path, keys: Sequence[str] = (), *, smooth: float = 0.0, logarithmic: bool = False
) -> None:
    """Draw a panel a metric to a PNG; losses by quartile and the prior's cosines share one.

    `keys` may hold patterns (`cos_*`); empty means everything. `smooth` in [0, 1) is the weight of the past in a
    running mean, as in TensorBoard, and the values themselves stay visible behind it.
    Raises UsageError: a key that no run has, no such folder. UnclipError: matplotlib is not installed, nothing
    can be written there.
    """
    known = list(dict.fromkeys(key for one in curves for key in one.points))
    panels = arrange(_chosen(keys, known))
    figure, axes = _canvas(len(panels))
    names = _names(curves)
    for panel, place in zip(panels, axes, strict=True):
        for number, one in enumerate(curves):
            for position, key in enumerate(panel.keys):
                if key not in one.points:
                    continue
                single = len(panel.keys) == 1
                style = {
                    "color": f"C{(number if single else position) % 10}",
                    "linestyle": "-" if single else _RUN_STYLES[number % len(_RUN_STYLES)],
                }
                noisy = key not in _COSINES and key != "lr"
                _line(place, *one.points[key], smooth if noisy else 0.0, style)
        place.set_title(panel.title, fontsize=10)
        place.set_xlabel("step", fontsize=8)
        place.tick_params(labelsize=8)
        place.grid(alpha=0.3)
        _scale(place, panel, logarithmic)
        _legend(place, panel, names)
    if len(curves) == 1:
        figure.suptitle(names[0], fontsize=11)
    temporary = out.with_name(f".tmp-{os.getpid()}-curves.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(temporary, dpi=100, format="png")
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UnclipError(f"{out} cannot be written: {error.strerror or error}") from error


def arrange(keys: Sequence[str]) -> list[Panel]:
    """Keys into panels: losses first, each with that of validation in it and its quartiles beside it, and cosines; the
    machine's last."""
    quartiles: dict[str, list[str]] = {}
    for key in keys:
        stem, _, ending = key.rpartition("_q")
        if stem and ending in ("0", "1", "2", "3"):
            quartiles.setdefault(stem, []).append(key)
    in_quartiles = {key for group in quartiles.values() for key in group}
    cosines = [key for key in _COSINES if key in keys]
    held_out = {key for key in keys if key.startswith(_VALIDATION) and key.removeprefix(_VALIDATION) in keys}
    grouped = {*in_quartiles, *held_out, *_COSINES, *_LAST}
    plain = sorted((key for key in keys if key not in grouped), key=lambda key: key != "loss")
    panels = []
    for key in plain:
        beside = (_VALIDATION + key,) if _VALIDATION + key in held_out else ()
        panels.append(Panel(_TITLES.get(key, key), (key, *beside)))
        if key in quartiles:
            panels.append(Panel(f"{key} by quarter of t", tuple(sorted(quartiles.pop(key)))))
    panels += [Panel(f"{stem} by quarter of t", tuple(sorted(group))) for stem, group in quartiles.items()]
    if cosines:
        panels.insert(1 if panels else 0, Panel("cosine of", tuple(cosines)))
    return panels + [Panel(_TITLES[key], (key,)) for key in _LAST if key in keys]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential running mean of finite values, unbiased from the first on: s_n = Σ wⁿ⁻ⁱ v_i / Σ wⁿ⁻ⁱ."""
    total = norm = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1
        result.append(total / norm if norm else math.nan)
    return result


def _chosen(keys: Sequence[str], known: Sequence[str]) -> list[str]:
    if not keys:
        return list(known)
    chosen: list[str] = []
    for key in keys:
        matching = [name for name in known if name == key or fnmatchcase(name, key)]
        if not matching:
            raise UsageError(f"no run has the metric {key!r}; known: {', '.join(known)}")
        chosen += [name for name in matching if name not in chosen]
    return chosen


def _canvas(count: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnclipError(
            "drawing curves needs the package matplotlib; install it with: pip install 'unclip[plot]'"
        ) from error
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 3.0 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def _line(place: Any, steps: list[int], values: list[float], smooth: float, style: dict[str, Any]) -> None:
    marker = "o" if len(steps) < 12 else ""
    if smooth > 0:
        place.plot(steps, values, color=style["color"], linestyle=style["linestyle"], alpha=0.25, linewidth=0.8)
        values = smoothed(values, smooth)
    place.plot(steps, values, linewidth=1.3, marker=marker, markersize=3, **style)


def _legend(place: Any, panel: Panel, names: Sequence[str]) -> None:
    """Below the panel, where it hides no curve: colours are metrics, and line styles are runs; of one metric, colours
    are runs."""
    from matplotlib.lines import Line2D

    single = len(panel.keys) == 1
    entries: list[tuple[str, dict[str, Any]]] = []
    if not single:
        entries = [(_label(key), {"color": f"C{i % 10}"}) for i, key in enumerate(panel.keys)]
    if len(names) > 1:
        for number, name in enumerate(names):
            style = {"color": "grey", "linestyle": _RUN_STYLES[number % len(_RUN_STYLES)]}
            entries.append((name, {"color": f"C{number % 10}"} if single else style))
    if entries:
        handles = [Line2D([], [], label=label, **style) for label, style in entries]
        columns = 2 if len(entries) < 5 else 3
        place.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=columns)


def _scale(place: Any, panel: Panel, logarithmic: bool) -> None:
    values = [value for line in place.get_lines() for value in line.get_ydata() if math.isfinite(value)]
    positive = bool(values) and min(values) > 0
    if logarithmic and positive and panel.keys[0] not in _COSINES and panel.keys[0] not in _LAST[3:]:
        place.set_yscale("log")
    elif panel.keys[0] in _LAST[3:]:
        place.set_ylim(0, 1.15 * max(values, default=1.0) or 1.0)
    if place.get_yscale() == "linear":
        place.ticklabel_format(axis="y", useOffset=False)


def _label(key: str) -> str:
    if key in _COSINES:
        return _COSINES[key]
    if not key[-1].isdigit() or key[-3:-1] != "_q":
        return "validation" if key.startswith(_VALIDATION) else "training"
    quarter = int(key[-1])
    return f"q{quarter} {_QUARTERS[quarter]}".strip()


def _names(curves: Sequence[Curves]) -> list[str]:
    """The last parts of each path, as many as tell the runs apart."""
    paths = [one.path for one in curves]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]
