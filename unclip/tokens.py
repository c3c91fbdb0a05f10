"""Learned tokens: new words of a CLIP, rows of its token table that were learned from pictures (textual inversion)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unclip.errors import UnclipError, UsageError

FORMAT = "unclip-tokens-1"
_NAME = re.compile(r"<[a-z0-9][a-z0-9_-]*>")
_MENTIONED = re.compile(_NAME.pattern, re.IGNORECASE)
_RESERVED = ("<start_of_text>", "<end_of_text>")
_PROBED = 32
_TOLERANCE = 2e-3  # of a weight: a copy in half precision is the same CLIP


@dataclass(frozen=True)
class LearnedTokens:
    """New words for the captions of one CLIP (Gal et al. 2022, textual inversion).

    vectors: for each name, such as '<zorb>', one or more rows (V, D) that take the place of rows of the CLIP's token
    table; a name of V rows takes V places in a caption. words: for each name what stands for it where a caption is
    read by something else than this CLIP (a decoder's own text transformer, a T5). probe: some weights of the token
    table, `probe_of`, by which the CLIP is known again.
    """

    vectors: Mapping[str, Tensor]
    words: Mapping[str, str]
    probe: Tensor

    def __post_init__(self) -> None:
        for name, rows in self.vectors.items():
            check_name(name)
            if rows.ndim != 2 or not len(rows) or not bool(torch.isfinite(rows).all()):
                raise UsageError(
                    f"the vectors of {name} have the shape {tuple(rows.shape)}; expected (V, D), one or more rows of "
                    "finite numbers"
                )

    def save(self, file: str | Path) -> None:
        """Write them to a safetensors file, whole or not at all. UnclipError: it cannot be written."""
        from safetensors.torch import save

        tensors = {name: rows.detach().float().cpu().contiguous() for name, rows in self.vectors.items()}
        metadata = {"format": FORMAT, "words": json.dumps({name: self.words.get(name, "") for name in self.vectors})}
        path = Path(file).expanduser()
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            temporary.write_bytes(save({**tensors, "probe": self.probe.detach().float().cpu().contiguous()}, metadata))
            temporary.replace(path)
        except OSError as error:
            raise UnclipError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, file: str | Path) -> LearnedTokens:
        """Read what `save` wrote. UnclipError: no such file, no tokens, damaged."""
        from safetensors import SafetensorError, safe_open

        path = Path(file).expanduser()
        if not path.is_file():
            raise UnclipError(f"there is no file of learned tokens at {path}")
        try:
            with safe_open(path, "pt") as stored:
                metadata: dict[str, str] = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UnclipError(f"{path} is damaged or not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT or "probe" not in tensors:
            raise UnclipError(f"{path} holds no learned tokens; expected what examples/personalise wrote")
        probe = tensors.pop("probe")
        try:
            return cls(tensors, dict(json.loads(metadata["words"])), probe)
        except (KeyError, ValueError, TypeError) as error:
            raise UnclipError(f"{path} is damaged: its metadata lacks or garbles {error}") from error
        except UsageError as error:
            raise UnclipError(f"{path} is damaged: {error}") from error

    def check(self, table: Tensor, source: str) -> None:
        """UnclipError unless they were learned for the CLIP that has this token table (N, D) and is called `source`."""
        own = probe_of(table)
        for name, rows in self.vectors.items():
            if rows.shape[1] != table.shape[1]:
                raise UnclipError(
                    f"the learned token {name} is {rows.shape[1]} wide and the tokens of the CLIP {source} are "
                    f"{table.shape[1]} wide; it was learned for another CLIP"
                )
        size = float(own.abs().max()) or 1.0
        if own.shape != self.probe.shape or float((own - self.probe.to(own)).abs().max()) > _TOLERANCE * size:
            raise UnclipError(
                f"the learned tokens {', '.join(self.vectors)} belong to another CLIP than {source}; learn them again "
                "with this one"
            )


def probe_of(table: Tensor) -> Tensor:
    """Some weights of a token table (N, D) by which a CLIP is told from another."""
    return table.detach()[: min(len(table), 4), :_PROBED].float().cpu().reshape(-1).clone()


def check_name(name: str) -> str:
    """UsageError unless it can be a learned token's name in a caption."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(
            f"{name!r} cannot name a learned token; expected small letters, digits, - or _ between < and >, such as "
            "'<zorb>'"
        )
    return name


def pieces(caption: str, names: Sequence[str] | Mapping[str, Tensor]) -> list[str]:
    """A caption cut at the learned tokens that it mentions, which become pieces of their own; '<Zorb>' is '<zorb>'."""
    found: list[str] = []
    end = 0
    for match in _MENTIONED.finditer(caption):
        if match[0].lower() in names:
            found += [caption[end : match.start()], match[0].lower()]
            end = match.end()
    return [piece for piece in (*found, caption[end:]) if piece.strip()]


def in_words(caption: str, words: Mapping[str, str]) -> str:
    """A caption with the words that stand for learned tokens in their places."""
    if "<" not in caption:
        return caption
    return _MENTIONED.sub(lambda match: words.get(match[0].lower(), match[0]), caption)


Spelled = list[int | tuple[str, int]]
"""Ids of a vocabulary, and learned rows by name and number."""


def spell(cut: Sequence[str], tokens: Mapping[str, Tensor], encode: Callable[[str], list[int]]) -> Spelled:
    """The pieces of a caption, as ids and as rows of learned tokens."""
    spelled: Spelled = []
    for piece in cut:
        if piece in tokens:
            spelled += [(piece, row) for row in range(len(tokens[piece]))]
        else:
            spelled += encode(piece)
    return spelled


def dropped_text(dropped: Spelled, decode: Callable[[list[int]], str]) -> str:
    """What was cut off a caption, for people to read."""
    named = dict.fromkeys(part[0] for part in dropped if isinstance(part, tuple))
    plain = decode([part for part in dropped if isinstance(part, int)]).strip()
    return " ".join(filter(None, [*named, plain]))


def place_rows(
    embedded: Tensor, places: Sequence[tuple[int, int, str, int]], tokens: Mapping[str, Tensor]
) -> Tensor:
    """Token embeddings (B, L, D) with learned rows in their places, each (sample, position, name, row); gradients reach
    the rows."""
    samples, positions = [place[0] for place in places], [place[1] for place in places]
    rows = torch.stack([tokens[name][row] for _, _, name, row in places])
    where = (torch.tensor(samples, device=embedded.device), torch.tensor(positions, device=embedded.device))
    return embedded.index_put(where, rows.to(embedded))
