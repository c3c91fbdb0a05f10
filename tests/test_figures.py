"""The script that draws the documentation's figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_figures_of_the_process_are_drawn(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "figures.py"), "--out", str(tmp_path)]
    subprocess.run([*command, "--only", "schedules", "variances"], check=True, cwd=ROOT, capture_output=True)
    for name in ("schedules", "variances"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 300
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50  # curves, not an empty page
