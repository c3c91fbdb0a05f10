"""FrozenCLIP: text and image embeddings from any open_clip model. The only module that imports open_clip,
with `unclip.clip_library`."""

from __future__ import annotations

import gzip
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.bundle import BUNDLED, MANIFEST, read_json, read_manifest, replacing, resolve_model, write_json
from unclip.clip_identity import CONFIG_FILE, WEIGHTS_FILE
from unclip.clip_library import library_for, library_of
from unclip.errors import UnclipError, UsageError, contents, nearest
from unclip.hub import answer_of
from unclip.notices import CutNotices
from unclip.text_features import TextFeatures
from unclip.tokens import LearnedTokens, dropped_text, in_words, pieces, place_rows, probe_of, spell

IMAGE_ENCODER = "image_encoder"
"""Entry of CONFIG_FILE, false where a model was converted that has a text encoder alone."""


class FrozenCLIP(nn.Module):
    """A CLIP that never learns: eval mode always, no gradients. Embeddings have unit length.

    `model` is an open_clip CLIP, `tokenizer` its tokenizer; use `load`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, source: str = "a model in memory") -> None:
        super().__init__()
        library = library_of(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source
        self.sees = True
        self.cuts = CutNotices()
        preprocess = library.model.get_model_preprocess_cfg(model)
        size = preprocess.get("size", 224)
        self.image_size = int(size[0] if isinstance(size, (tuple, list)) else size)
        mean = preprocess.get("mean") or library.constants.OPENAI_DATASET_MEAN
        std = preprocess.get("std") or library.constants.OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        tower: Any = model.text if hasattr(model, "text") else model
        if not hasattr(tower, "ln_final"):
            raise UnclipError(
                f"the text tower of {source} gives no token features; use a CLIP with open_clip's own text tower"
            )
        norm: Any = tower.ln_final
        self._final_norm = norm
        self._token_table: nn.Embedding = tower.token_embedding
        self.tokens: dict[str, Tensor] = {}
        self._words: dict[str, str] = {}
        self.context_length = int(getattr(tower, "context_length", 77))
        self.token_dim = int(norm.weight.shape[0])
        self.vocab_size = int(self._token_table.num_embeddings)
        with torch.no_grad():
            self.embedding_dim = int(self.model.encode_text(self._tokenize([""])[0]).shape[-1])  # type: ignore[operator]

    @classmethod
    def load(cls, name: str, pretrained: str | None = None, device: torch.device | str = "cpu") -> FrozenCLIP:
        """Load a CLIP by what `name` is: a folder with `open_clip_config.json` (+ weights), an open_clip architecture
        (with a `pretrained` tag or file, or `name` as 'ViT-B-32/openai'), a Hub id 'hf-hub:user/name', or a bundle
        with one inside ('emoji' is the bundled one).

        Raises UnclipError when nothing of that name can be loaded; pretrained weights that open_clip must download are
        kept in the Hub's cache.
        """
        logging.getLogger("open_clip").setLevel(logging.ERROR)
        folder = clip_folder(name)
        library = library_for(folder)
        tokenizer_options: dict[str, Any] = {}
        if folder.is_dir():
            if not (folder / CONFIG_FILE).is_file():
                lacking = f"{CONFIG_FILE} is missing (found: {contents(folder)})"
                raise UnclipError(f"{folder} is not an open_clip model: {lacking}")
            tokenizer_options = _tokenizer_options(folder)
            identifier = f"local-dir:{folder.resolve()}"
        else:
            known = library.factory.list_models()
            if pretrained is None and "/" in name and name.split("/")[0] in known:
                name, pretrained = name.split("/", 1)
            if not name.startswith("hf-hub:") and name not in known:
                raise UnclipError(
                    f"no CLIP called {name!r}: no folder, no 'hf-hub:user/name', no architecture of open_clip "
                    f"({nearest(name, known)})"
                )
            if name in known and pretrained is None:
                raise UnclipError(
                    f"the architecture {name!r} alone has random weights; name a pretrained tag: '{name}/openai'"
                )
            identifier = name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = library.factory.create_model(identifier, pretrained=pretrained, require_pretrained=True)
                tokenizer = library.factory.get_tokenizer(identifier, **tokenizer_options)
        except Exception as error:  # open_clip raises whatever its loaders raise
            raise UnclipError(f"the CLIP {name!r} cannot be loaded: {answer_of(error)}") from error
        clip = cls(model, tokenizer, name).to(device)
        clip.sees = not folder.is_dir() or read_json(folder / CONFIG_FILE).get(IMAGE_ENCODER, True)
        return clip

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stays in eval mode: the CLIP is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def logit_scale(self) -> float:
        """What the CLIP multiplies cosines by before a softmax: its inverse temperature (Radford et al. 2021)."""
        learned: Any = self.model.logit_scale
        return float(learned.detach().float().exp())

    def add_tokens(self, tokens: LearnedTokens) -> None:
        """Let captions mention learned tokens by their names, such as '<zorb>'.

        Raises UnclipError: they were learned for another CLIP, or this one's tokenizer is not open_clip's own;
        UsageError: a name that is taken.
        """
        if getattr(self.tokenizer, "eot_token_id", None) is None:
            raise UnclipError(f"{self.source} has a tokenizer of transformers, and learned tokens need open_clip's own")
        tokens.check(self._token_table.weight, self.source)
        for name in tokens.vectors:
            if name in self.tokens:
                raise UsageError(f"a learned token {name} is there already; load each name once")
        self.tokens |= {name: rows.to(self.device) for name, rows in tokens.vectors.items()}
        self._words |= tokens.words

    def learned(self, vectors: Mapping[str, Tensor], words: Mapping[str, str]) -> LearnedTokens:
        """Tokens learned for this CLIP, marked so."""
        return LearnedTokens(vectors, words, probe_of(self._token_table.weight))

    def token_vectors(self, words: str) -> Tensor:
        """The rows (V, D) of the token table that some words are spelled with."""
        ids, mask, _ = self._tokenize([words])
        return self._token_table.weight.detach()[ids[0, mask[0]][1:-1].to(self.device)].clone()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextFeatures:
        """Captions -> token features (the final LayerNorm's output), mask and unit-length embedding, float32.

        A caption longer than the context is cut, with a warning that quotes the words dropped.
        """
        return self.text_features(captions)

    def text_features(self, captions: Sequence[str], tokens: Mapping[str, Tensor] | None = None) -> TextFeatures:
        """As `encode_text`, with gradients to `tokens`: rows (V, D) for names that captions mention beside the tokens
        that were added. The CLIP itself stays frozen.
        """
        known = {**self.tokens, **(tokens or {})}
        ids, mask, places = self._tokenize(captions, tokens=known)
        ids, mask = ids.to(self.device), mask.to(self.device)
        caught: list[Tensor] = []
        hooks = [self._final_norm.register_forward_hook(lambda _m, _i, output: caught.append(output))]
        if places:
            # The tower knows the ids of its own vocabulary alone: learned rows go in where those are looked up.
            put = self._token_table.register_forward_hook(lambda _m, _i, output: place_rows(output, places, known))
            hooks.append(put)
        try:
            embedding = self.model.encode_text(ids)  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
        features = caught[-1].float()
        embedding = embedding.float()
        return TextFeatures(features * mask[..., None], mask, F.normalize(embedding, dim=-1), embedding.norm(dim=-1))

    def in_words(self, captions: Sequence[str]) -> list[str]:
        """Captions for a reader that knows no learned tokens: the words that they were learned from stand for them."""
        return [in_words(caption, self._words) for caption in captions]

    def token_ids(self, captions: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Captions -> ids (B, L) int64 and mask (B, L), True from start to end token, for a text encoder that is
        trained on this CLIP's vocabulary (`vocab_size`). `length` is the CLIP's context length by default.

        A caption longer than that is cut, with a warning that quotes the words dropped.
        """
        ids, mask, _ = self._tokenize(self.in_words(captions), length)
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def encode_image(self, images: Tensor, *, unit_length: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], any size -> embeddings (B, E), float32, of unit length or the CLIP's own.

        Raises UnclipError: this CLIP came without an image encoder.
        """
        if not self.sees:
            raise UnclipError(
                f"the CLIP in {self.source} has no image encoder, so that no picture can be read; convert the model "
                "again with --clip, or together with the folder that has an image_encoder"
            )
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        pixels = ((images + 1) / 2 - self.mean) / self.std
        embedding: Tensor = self.model.encode_image(pixels).float()  # type: ignore[operator]
        return F.normalize(embedding, dim=-1) if unit_length else embedding

    def _tokenize(
        self, captions: Sequence[str], length: int | None = None, tokens: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, list[tuple[int, int, str, int]]]:
        """-> ids (B, L), mask (B, L): start to end token, padding left out; and where rows of learned tokens go, whose
        ids are 0: sample, position, name, row."""
        length = length or self.context_length
        ids: Tensor = self.tokenizer(list(captions), context_length=length)
        end = getattr(self.tokenizer, "eot_token_id", None)
        if end is None:  # a Hugging Face tokenizer
            pad = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", 0) or 0
            return ids, ids != pad, []
        places: list[tuple[int, int, str, int]] = []
        for sample, caption in enumerate(captions):
            cut = pieces(caption, tokens) if tokens and "<" in caption else [caption]
            if tokens and any(piece in tokens for piece in cut):
                ids[sample], found = self._spelled(cut, tokens, length)
                places += [(sample, position, name, row) for position, name, row in found]
            else:
                self._warn_if_cut(caption, ids[sample], length)
        last = (ids == end).int().argmax(dim=1, keepdim=True)
        return ids, torch.arange(ids.shape[1]) <= last, places

    def _spelled(
        self, cut: list[str], tokens: Mapping[str, Tensor], length: int
    ) -> tuple[Tensor, list[tuple[int, str, int]]]:
        """A caption in pieces -> ids (L,), and position, name and row of each learned row."""
        spelled = spell(cut, tokens, self.tokenizer.encode)
        room = length - 2
        if len(spelled) > room:
            self._warn_cut(dropped_text(spelled[room:], self.tokenizer.decode), length)
        ids = [part if isinstance(part, int) else 0 for part in spelled[:room]]
        ids = [self.tokenizer.sot_token_id, *ids, self.tokenizer.eot_token_id]
        found = [(i, *part) for i, part in enumerate(spelled[:room], 1) if isinstance(part, tuple)]
        return torch.tensor(ids + [0] * (length - len(ids))), found

    def _warn_if_cut(self, caption: str, row: Tensor, length: int) -> None:
        if row[-1] == 0 or self.cuts.over:  # there was room left, or enough is said
            return
        whole = self.tokenizer.encode(caption)
        room = length - 2
        if len(whole) > room:
            self._warn_cut(self.tokenizer.decode(whole[room:]).strip(), length)

    def _warn_cut(self, dropped: str, length: int) -> None:
        self.cuts.give(dropped, "CLIP's" if length == self.context_length else "the text encoder's", length)


def clip_folder(name: str) -> Path:
    """`name` as a path; of a bundle's folder, or of the bundled model's name, the CLIP inside it."""
    folder = Path(name)
    if (name == BUNDLED and not folder.exists()) or (folder / MANIFEST).is_file():
        folder = resolve_model(name)
        parts = read_manifest(folder)["parts"]
        if "clip" not in parts:
            raise UnclipError(f"{folder / MANIFEST} names no 'clip'; it has {', '.join(parts)}")
        return folder / parts["clip"]
    return folder


def architecture(name: str) -> dict[str, Any] | None:
    """open_clip's `model_cfg` of an architecture ('ViT-L-14', or 'ViT-L-14/openai'); None where it knows none of that
    name. Nothing is downloaded.
    """
    import open_clip

    if ":" in name:  # a Hub id, which open_clip would look up there
        return None
    found: dict[str, Any] | None = open_clip.get_model_config(name.split("/")[0])
    return found


def build_architecture(config: dict[str, Any]) -> nn.Module:
    """An open_clip CLIP of a `model_cfg`, with fresh weights and without a tokenizer, on the default device."""
    import open_clip

    text = {key: value for key, value in config["text_cfg"].items() if key != "tokenizer_kwargs"}
    kind = open_clip.model.CustomTextCLIP if config.get("custom_text") else open_clip.model.CLIP
    return kind(  # type: ignore[no-any-return]
        config["embed_dim"],
        dict(config["vision_cfg"]),
        text,
        quick_gelu=config.get("quick_gelu", False),
        nonscalar_logit_scale=True,
        output_dict=True,
    )


def build_trainable(config: dict[str, Any], folder: Path | None = None) -> tuple[nn.Module, Any]:
    """A new open_clip CLIP from a `model_cfg` dictionary, with its tokenizer: what train_clip.py trains.

    `folder` resolves a relative `bpe_path` of the tokenizer.
    """
    import open_clip

    text = dict(config["text_cfg"])
    options = dict(text.pop("tokenizer_kwargs", None) or {})
    if folder is not None and "bpe_path" in options:
        options["bpe_path"] = str(folder / options["bpe_path"])
    tokenizer = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77), **options)
    if text.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise UnclipError(
            f"text_cfg.vocab_size is {text['vocab_size']}, the tokenizer has {tokenizer.vocab_size} tokens"
        )
    text["vocab_size"] = tokenizer.vocab_size
    model = open_clip.model.CLIP(
        config["embed_dim"],
        dict(config["vision_cfg"]),
        text,
        nonscalar_logit_scale=True,  # DeepSpeed cannot broadcast a parameter without dimensions
        output_dict=True,
    )
    return model, tokenizer


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, rank: int = 0, world_size: int = 1) -> Tensor:
    """open_clip's contrastive loss over all processes' unit-length embeddings (B, E); a scalar."""
    import open_clip

    loss = open_clip.ClipLoss(
        local_loss=world_size > 1, gather_with_grad=world_size > 1, rank=rank, world_size=world_size
    )
    return loss(image, text, logit_scale)  # type: ignore[no-any-return]


def save_folder(folder: Path, model_config: dict[str, Any], state: dict[str, Tensor], bpe: Path | None) -> None:
    """Write a CLIP in open_clip's local-dir layout: `open_clip_config.json`, `open_clip_model.safetensors`,
    vocabulary."""
    from safetensors.torch import save_file

    size = model_config["vision_cfg"]["image_size"]
    scale = {"mean": [0.5] * 3, "std": [0.5] * 3}
    preprocess = {"size": [size, size], **scale, "interpolation": "bicubic", "resize_mode": "squash"}
    with replacing(folder) as temporary:
        write_json(temporary / CONFIG_FILE, {"model_cfg": model_config, "preprocess_cfg": preprocess})
        # One file whatever its size: open_clip reads no shards.
        weights = temporary / WEIGHTS_FILE
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, weights, {"format": "pt"}
        )
        weights.chmod(0o644)  # safetensors makes it readable by its owner alone
        if bpe is not None:
            shutil.copyfile(bpe, temporary / bpe.name)


def write_vocabulary(file: Path, merges: int) -> int:
    """The first `merges` merges of CLIP's byte-pair vocabulary as a file of its own; returns the number of tokens.

    Merges are ordered by how common they are, so a small CLIP keeps whole common words and spells rare ones.
    """
    lines = _vocabulary_lines()[: merges + 1]
    temporary = file.with_name(f".tmp-{file.name}")
    with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed:
        packed.write("\n".join(lines).encode())
    temporary.replace(file)
    return 2 * 256 + merges + 2


def byte_alphabet() -> list[str]:
    """The letters that stand for the 256 bytes, in the order of their tokens."""
    from open_clip.tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def default_vocabulary() -> list[str]:
    """The merges of CLIP's own byte-pair vocabulary, 'a b' each: 49,408 tokens with bytes, start and end."""
    return _vocabulary_lines()[1 : 49152 - 256 - 2 + 1]


def _vocabulary_lines() -> list[str]:
    """A heading, then a merge a line."""
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as whole:
        return whole.read().split("\n")


def _tokenizer_options(folder: Path) -> dict[str, Any]:
    """open_clip resolves a relative `bpe_path` against the working directory; here it belongs to the model's folder."""
    text = read_json(folder / CONFIG_FILE).get("model_cfg", {}).get("text_cfg", {})
    path = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if not path:
        return {}
    if Path(path).name != path or not (folder / path).is_file():
        raise UnclipError(f"{folder} is incomplete: its vocabulary {path!r} is missing")
    return {"bpe_path": str(folder / path)}
