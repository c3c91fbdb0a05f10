"""The CLIP part of a converted bundle, from a pipeline's own encoders or from open_clip."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.bundle import read_json, write_json
from unclip.clip import CONFIG_FILE, IMAGE_ENCODER, FrozenCLIP, architecture, clip_folder, default_vocabulary
from unclip.errors import UnclipError, contents
from unclip.interop.tensors import as_dtype
from unclip.interop.vocabulary import BPE_FILE, write_bpe

WEIGHTS = "open_clip_model.safetensors"
KARLO_CLIP = "ViT-L-14-quickgelu/openai"
"""What Karlo was trained with, as open_clip names it."""
# OpenAI's normalisation, which transformers' CLIPImageProcessor has by default too.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocessing(folder: Path | None, size: int) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` for a `feature_extractor` folder, or CLIP's own without one."""
    body = {} if folder is None else read_json(folder / "preprocessor_config.json")
    return {
        "size": [size, size],
        "mean": list(body.get("image_mean") or _MEAN),
        "std": list(body.get("image_std") or _STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def write_clip(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    merges: list[str] | None,
    preprocess: Mapping[str, Any],
    *,
    sees: bool = True,
) -> None:
    """A CLIP in open_clip's layout; one file of weights, as open_clip reads no shards. `merges` None: CLIP's own."""
    from safetensors.torch import save_file

    text = dict(config["text_cfg"])
    text.pop("tokenizer_kwargs", None)
    folder.mkdir()
    if merges is not None and merges != default_vocabulary():
        write_bpe(folder / BPE_FILE, merges)
        text["tokenizer_kwargs"] = {"bpe_path": BPE_FILE}
    body: dict[str, Any] = {"model_cfg": {**config, "text_cfg": text}, "preprocess_cfg": dict(preprocess)}
    if not sees:
        body[IMAGE_ENCODER] = False
    write_json(folder / CONFIG_FILE, body)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


def write_named_clip(folder: Path, name: str, dtype: torch.dtype | None) -> None:
    """The CLIP that open_clip knows as `name`, or the one in a folder in open_clip's layout, as a part.

    Raises UnclipError: as FrozenCLIP.load; a folder without safetensors.
    """
    source = clip_folder(name)
    if source.is_dir():
        if not (source / CONFIG_FILE).is_file() or not (source / WEIGHTS).is_file():
            raise UnclipError(
                f"{source} is not an open_clip model: expected {CONFIG_FILE} and {WEIGHTS} (found: {contents(source)})"
            )
        folder.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and (file.name in (CONFIG_FILE, WEIGHTS) or file.suffix in (".gz", ".txt")):
                shutil.copyfile(file, folder / file.name)
        return
    known = architecture(name)
    clip = FrozenCLIP.load(name)
    if known is None:
        raise UnclipError(f"{name!r} cannot be stored with a bundle; download it into a folder and name that")
    state = {key: tensor.detach() for key, tensor in clip.model.state_dict().items()}
    preprocess = preprocessing(None, clip.image_size)
    preprocess |= {"mean": clip.mean.flatten().tolist(), "std": clip.std.flatten().tolist()}
    write_clip(folder, known, as_dtype(state, dtype, name), None, preprocess)
