"""open_clip, as much of it as a CLIP needs.

`import open_clip` brings torchvision, timm and transformers, which take as long as torch itself; a CLIP with
open_clip's own towers uses none of them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from unclip import lean
from unclip.bundle import read_json
from unclip.clip_identity import CONFIG_FILE, WEIGHTS_FILE
from unclip.errors import UnclipError

_FOREIGN = frozenset({"timm_model_name", "hf_model_name", "hf_tokenizer_name", "multimodal_cfg"})
_PACKAGES = ("open_clip", "torchvision", "torchvision.ops")
_OPTIONAL = ("timm", "transformers", "huggingface_hub")
"""What open_clip imports under `try`, and does without."""


def library_for(folder: Path) -> Any:
    """open_clip for the CLIP in `folder`, which may be none: the whole, or in a process of the command's own
    (`unclip.lean`) what a CLIP without foreign towers needs. Of both, `factory`, `model` and `constants` may be used.
    """
    if "open_clip" not in sys.modules and lean.is_own() and is_plain(folder):
        with suppress(Exception):  # another version may be arranged differently; the whole is always right
            return _lean()
    import open_clip

    return open_clip


def library_of(model: nn.Module) -> Any:
    """The open_clip that has the class of `model`."""
    if _lean.cache_info().currsize and isinstance(model, (_lean().model.CLIP, _lean().model.CustomTextCLIP)):
        return _lean()
    import open_clip

    return open_clip


def is_plain(folder: Path) -> bool:
    """Whether the CLIP in `folder` has open_clip's own towers and tokenizer, and its weights as safetensors. False also
    where its configuration cannot be read.
    """
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return False
    try:
        config = read_json(folder / CONFIG_FILE).get("model_cfg")
    except UnclipError:
        return False
    if not isinstance(config, dict):
        return False
    parts = (config, config.get("vision_cfg"), config.get("text_cfg"))
    return all(isinstance(part, dict) and not _FOREIGN.intersection(part) for part in parts)


@functools.cache
def _lean() -> Any:
    """A copy of open_clip's factory and what that stands on; `import open_clip` afterwards gives the whole, whose
    classes are others.
    """
    with lean.skeleton(_PACKAGES, absent=_OPTIONAL):
        importlib.import_module("open_clip.factory")
        return sys.modules["open_clip"]
