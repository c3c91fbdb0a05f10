"""The script that draws the documentation's figures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_figures_of_the_process_are_drawn(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "figures.py"), "--out", str(tmp_path)]
    unnamed = {name: value for name, value in os.environ.items() if name != "EMOJI"}
    asked = ["--only", "evaluation_curves", "schedules", "variances"]
    done = subprocess.run([*command, *asked], cwd=ROOT, capture_output=True, text=True, env=unnamed)
    assert done.returncode == 1 and "left as it is: evaluation_curves needs EMOJI in the environment" in done.stderr
    assert not (tmp_path / "evaluation_curves.png").exists()
    for name in ("schedules", "variances"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 300
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50  # curves, not an empty page


def test_the_evaluation_figures_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture of the page is made by a line, and every line stands on the page as it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import figures_evaluation

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    shown = re.findall(r"images/(evaluation_\w+)\.png", page)
    assert sorted(shown) == sorted(figures_evaluation.FIGURES)
    written = " ".join(page.replace("\\\n", " ").split())
    for name, line in figures_evaluation.LINES.items():
        asked = line.replace("DATA", "data/emoji_natural")
        assert f"unclip {asked.replace('SHAPES', 'runs/synthetic/model')}" in written, name
    monkeypatch.delenv("EMOJI", raising=False)
    with pytest.raises(figures_evaluation.NotNamed, match="needs EMOJI in the environment"):
        figures_evaluation.command("eval")
    monkeypatch.setenv("EMOJI", "my/emoji")
    assert figures_evaluation.command("prior")[2:4] == ["--data", "my/emoji"]
