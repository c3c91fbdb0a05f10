"""A frozen T5-style text encoder (Imagen, §2.1), read through `transformers`, which loads only when one is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.errors import UnclipError, contents
from unclip.notices import CutNotices


class FrozenT5(nn.Module):
    """An encoder that never learns: eval mode always, no gradients. Use `load`."""

    def __init__(self, model: nn.Module, tokenizer: Any, width: int, source: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.width, self.source = tokenizer, width, source
        self.cuts = CutNotices()

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> FrozenT5:
        """A local folder or a Hub id with a T5, mT5, umT5 or similar encoder (a whole model serves too) and its
        tokenizer. Raises UnclipError: `transformers` is not installed, or nothing of that name can be loaded.
        """
        transformers = _transformers()
        config = _config(name)
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)  # a whole T5's decoder is left unread on purpose
        try:
            model = transformers.AutoModelForTextEncoding.from_pretrained(name, config=config)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises whatever its loaders raise
            raise UnclipError(f"the text encoder {name!r} cannot be loaded: {_reason(error)}") from error
        return cls(model.float(), tokenizer, _width(config, name), name).to(device)

    @staticmethod
    def width_of(name: str) -> int:
        """Width of an encoder's features, from its configuration alone. Raises as `load`."""
        return _width(_config(name), name)

    def train(self, mode: bool = True) -> FrozenT5:
        """Stays in eval mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Captions -> features (B, length, width) float32, zero on padding, and mask (B, length), True = real token.
        A caption longer than `length` is cut, with a warning that quotes the words dropped.
        """
        self._warn_of_cuts(captions, length)
        device = next(self.model.parameters()).device
        batch = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        seen = mask.bool()
        return tokens * seen[..., None], seen

    def _warn_of_cuts(self, captions: Sequence[str], length: int) -> None:
        if self.cuts.over:
            return
        for ids in self.tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]:
            room = length - self.tokenizer.num_special_tokens_to_add()
            if len(ids) > room:
                self.cuts.give(self.tokenizer.decode(ids[room:]).strip(), "the text encoder's", length)


def _config(name: str) -> Any:
    transformers = _transformers()
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UnclipError(f"{folder} is no text encoder: config.json is missing (found: {contents(folder)})")
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # as above
        raise UnclipError(
            f"no text encoder {name!r}: it is no folder here, and the Hub gave none of that name: {_reason(error)}"
        ) from error


def _width(config: Any, name: str) -> int:
    width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UnclipError(f"{name!r} is a {getattr(config, 'model_type', 'model')!r}, expected a T5-style text encoder")
    return width


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnclipError(
            "a decoder with text.kind 't5' needs the package transformers; install it with: pip install 'unclip[t5]'"
        ) from error
    return transformers


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
