"""This project's own warnings as one line each, told apart from those of libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("unclip", "prior", "decoder", "upsamplers")
_ROOT = Path(__file__).parents[1]


def in_lines(command: str, otherwise: Callable[..., None]) -> Callable[..., None]:
    """For `warnings.showwarning`: "COMMAND: warning: …" on stderr, each text once; a library's goes to `otherwise`."""
    seen: set[str] = set()

    def show(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if category is not UserWarning or not _is_own(filename):
            otherwise(message, category, filename, *rest, **named)
            return
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            print(f"{command}: warning: {text}", file=sys.stderr)

    return show


def _is_own(filename: str) -> bool:
    file = Path(filename)
    return file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in _PACKAGES
