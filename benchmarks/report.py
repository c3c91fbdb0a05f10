"""Results as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contest import Row
from benchmarks.timing import Spread


def give_out(report: Mapping[str, Any], text: Callable[..., str], path: Path | None) -> None:
    """Print `text` of a report; where a path is given, write the report there as JSON."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(text(report))


def to_json(
    machine: dict[str, Any], settings: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]
) -> dict[str, Any]:
    return {"machine": machine, "settings": settings, "notes": list(notes), "rows": [asdict(row) for row in rows]}


def to_markdown(
    machine: dict[str, Any], settings: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]
) -> str:
    """The machine in a line, a table, the notes. Times are medians, ratios medians of paired runs with quartiles."""
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), "
        f"device {machine['device']}, load {machine['load'][0]} at the start, "
        f"bfloat16 in hardware: {'yes' if machine['bfloat16'] else 'no'}; "
        f"Python {machine['python']}, {versions}; size {settings['size']}, {settings['runs']} runs; "
        f"measured peak {settings['peak'] / 1e9:.0f} GFLOP/s.",
        "",
        "| stage | work | ours | peer | equal | GFLOP, ours | peer | ours s | peer s | times as fast | "
        "largest difference | of peak, ours | peer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "—" if row.difference is None else f"{row.difference:.1e}"
        lines.append(
            f"| {row.stage} | {row.work} | {row.ours} | {row.peer} | {row.equal} | {row.flops / 1e9:.3g} | "
            f"{row.peer_flops / 1e9:.3g} | {row.seconds.median:.3g} | "
            f"{row.peer_seconds.median:.3g} | {_ratio(row.ratio)} | {difference} | {row.peak:.0%} | "
            f"{row.peer_peak:.0%} |"
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _ratio(ratio: Spread) -> str:
    return f"**{ratio.median:.2f}** ({ratio.low:.2f}–{ratio.high:.2f})"
