"""CLIP's byte-pair vocabulary: Hugging Face's tokenizer folder <-> the merges file that open_clip reads.

Both number tokens alike: 256 bytes, the same 256 at the end of a word, the merges, start and end. So the merges are the
whole vocabulary, and a folder whose numbers differ is refused.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from unclip.bundle import read_json, write_json
from unclip.clip import byte_alphabet, default_vocabulary
from unclip.errors import UnclipError

BPE_FILE = "bpe_vocabulary.txt.gz"
_HEADER = "#version: 0.2"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_merges(folder: Path) -> list[str]:
    """The merges of a Hugging Face CLIPTokenizer's folder ('a b' each), in their order.

    Reads `vocab.json` + `merges.txt`, or `tokenizer.json`. Raises UnclipError: neither is there, or it is a vocabulary
    that open_clip's tokenizer would number otherwise.
    """
    vocab, merges = _read(folder)
    expected = _numbered(merges)
    if vocab != expected:
        wrong = next((token for token, number in expected.items() if vocab.get(token) != number), None)
        what = f"{wrong!r} is {vocab.get(wrong)}, expected {expected[wrong]}" if wrong is not None else "unknown tokens"
        raise UnclipError(f"{folder} is no CLIP vocabulary of {len(merges)} merges: {what}")
    return merges


def write_bpe(file: Path, merges: list[str]) -> None:
    """The merges as open_clip reads them, in bytes that depend on the merges alone."""
    with file.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed:
        packed.write("\n".join([_HEADER, *merges]).encode())


def read_bpe(file: Path | None) -> list[str]:
    """The merges of a file that open_clip reads, CLIP's own for None."""
    if file is None:
        return default_vocabulary()
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1:]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UnclipError(f"the vocabulary {file} cannot be read: {error}") from error
    return [line for line in lines if line.strip()]


def write_tokenizer(folder: Path, merges: list[str], length: int) -> None:
    """A CLIPTokenizer's folder, padded with '!' (number 0) as Karlo's is."""
    folder.mkdir()
    write_json(folder / "vocab.json", _numbered(merges))
    (folder / "merges.txt").write_text("\n".join([_HEADER, *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": "!"}
    write_json(folder / "special_tokens_map.json", special)
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**options, "add_prefix_space": False, "errors": "replace", **special})


def _read(folder: Path) -> tuple[dict[str, int], list[str]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        text = (folder / "merges.txt").read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
        return {str(token): number for token, number in read_json(folder / "vocab.json").items()}, lines
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        raise UnclipError(f"{folder} is no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
    model: Any = read_json(whole).get("model")
    if not isinstance(model, dict) or not {"vocab", "merges"} <= set(model):
        raise UnclipError(f"{whole} holds no byte-pair vocabulary")
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return dict(model["vocab"]), merges


def _numbered(merges: list[str]) -> dict[str, int]:
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate([*tokens, _START, _END])}


