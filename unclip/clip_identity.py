"""Which CLIP it is, told without loading it: so that embeddings of one are not taken for another's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_PROBED = 32
_TOLERANCE = 2e-3  # of a weight: a copy in half precision is the same CLIP


def identify(name: str) -> dict[str, Any]:
    """`name` as FrozenCLIP.load takes it -> for a folder, a hash of its architecture, widths, and a few of its
    weights; else the name. Nothing is loaded or downloaded.
    """
    folder = Path(name)
    config = folder / CONFIG_FILE
    if not config.is_file():
        return {"name": name}
    try:
        model = json.loads(config.read_text(encoding="utf-8")).get("model_cfg", {})
    except (ValueError, AttributeError):
        return {"name": name}
    text = json.dumps(model, sort_keys=True)
    found: dict[str, Any] = {"config": hashlib.sha256(text.encode()).hexdigest(), "probe": _probe(folder)}
    widths = {
        "embedding_dim": model.get("embed_dim"),
        "token_dim": (model.get("text_cfg") or {}).get("width"),
        "text_length": (model.get("text_cfg") or {}).get("context_length", 77),
    }
    return {**found, "widths": widths}


def same_clip(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """What tells two apart, in words; None where nothing does, also where that cannot be known."""
    if "name" in first and "name" in second:
        return None if first["name"] == second["name"] else f"they are of {first['name']!r}"
    if "config" not in first or "config" not in second:
        return None
    if first["config"] != second["config"]:
        return "its architecture is another"
    one, other = first.get("probe"), second.get("probe")
    if one and other:
        size = max(abs(value) for value in one) or 1.0
        if any(abs(a - b) > _TOLERANCE * size for a, b in zip(one, other, strict=False)):
            return "its architecture is the same, its weights are others"
    return None


def _probe(folder: Path) -> list[float] | None:
    """The first few weights of the text projection, or of the first matrix by name; None where the weights are in
    another format than safetensors."""
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as weights:
            names = sorted(weights.keys())
            matrices = [name for name in names if len(weights.get_slice(name).get_shape()) == 2]
            name = "text_projection" if "text_projection" in matrices else matrices[0]
            row = weights.get_slice(name)[0:1].float().flatten()[:_PROBED]
            return [round(float(value), 6) for value in row]
    except (SafetensorError, OSError, IndexError):
        return None
