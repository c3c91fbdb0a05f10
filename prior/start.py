"""A prior that starts from a trained one: what is carried over, and what starts anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.autoregressive import AutoregressivePrior
from prior.config import CONFIGS, AutoregressivePriorConfig, PriorConfig, PriorRunConfig
from prior.dalle2 import Dalle2PriorConfig
from prior.network import Prior
from prior.sampling import KIND, read_prior_config
from unclip.bundle import load_weights
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.training.start import Reader, Start, carry_over, inherited, open_start

_CLIP_NULL = ("clip_null_tokens", "clip_null_mask", "clip_null_embedding")
_LEARNED_NULL = ("null_tokens", "null_text")
_SPACE = ("mean", "std")


def read_part(folder: Path) -> tuple[PriorConfig | AutoregressivePriorConfig, dict[str, Tensor]]:
    """A prior part's configuration and weights, of either kind."""
    return read_shape(folder)[0], load_weights(folder)


def read_shape(folder: Path) -> tuple[PriorConfig | AutoregressivePriorConfig, dict[str, Tensor]]:
    """As `read_part`, without the weights. Raises UnclipError: a prior that is only run here."""
    config = read_prior_config(folder)
    if isinstance(config, Dalle2PriorConfig):
        raise UnclipError(
            f"{folder} holds a prior of DALLE2-pytorch, which is run here and not trained; start from another"
        )
    return config, {}


def with_start(
    config: PriorRunConfig, foreign: Reader | None = None, read: Reader = read_part
) -> tuple[PriorRunConfig, Start | None]:
    """Open what `init_from` names, and fill in what `model` leaves out as it is there. Raises as `open_start`, and
    UnclipError: a prior of the other kind.
    """
    if config.init_from is None:
        return config, None
    start = open_start(config.init_from, KIND, read, foreign=foreign, weights=read is read_part)
    body = inherited(start, config.model)
    if body["kind"] != start.config.kind:
        raise UnclipError(
            f"{start.folder} holds a prior of kind {start.config.kind}, and model.kind is {body['kind']}; one cannot "
            "start from the other"
        )
    if body.get("components", 0) is None:
        body["components"] = start.config.components
    model = parse_config(CONFIGS[body["kind"]], body, origin=f"model, with {start.folder}")
    return config.model_copy(update={"model": model}), start


def keeps_space(config: Any, start: Start | None) -> bool:
    """Whether the embeddings' statistics are the checkpoint's: its weights know no other space than theirs."""
    if start is None:
        return False
    if isinstance(config, AutoregressivePriorConfig):
        return True
    before: PriorConfig = start.config
    return (before.normalisation, before.scale) == (config.normalisation, config.scale)


def begin_from(network: Prior | AutoregressivePrior, start: Start) -> str | None:
    """Load a trained prior's weights of the same shape. Returns a sentence on what starts anew, if anything does.

    Where it predicts another quantity (ε, x_0, v), the output layer starts anew. Where one drops captions by learned
    vectors and the other by the CLIP's features of '', the projections of the latter become the former's first values;
    the other way the features are the CLIP's, as always in training.
    Raises UnclipError: the weights do not fit otherwise.
    """
    before, config, state, own = start.config, network.config, dict(start.state), network.state_dict()
    fresh, left, notes = [], [], []
    if isinstance(config, PriorConfig):
        if before.diffusion.prediction != config.diffusion.prediction:
            fresh += [name for name in own if name.startswith("out.")]
            notes.append(
                f"the output layer starts anew, as it predicted {before.diffusion.prediction} and now predicts "
                f"{config.diffusion.prediction}"
            )
        if not keeps_space(config, start):
            fresh += _SPACE
            notes.append("embeddings are normalised otherwise than there, so the weights meet another space")
    if before.null_text != config.null_text:
        note, kept, dropped = _other_null(network, start, state)
        notes, fresh, left = [*notes, note], [*fresh, *kept], dropped
    elif config.null_text == "clip":
        fresh += [name for name in _CLIP_NULL if name in state and state[name].shape != own[name].shape]
    carry_over(network, Start(start.folder, before, state), KIND, fresh=fresh, left=left)
    return f"from {start.folder}: {'; '.join(notes)}" if notes else None


def _other_null(
    network: Prior | AutoregressivePrior, start: Start, state: dict[str, Tensor]
) -> tuple[str, list[str], list[str]]:
    """A note, the network's tensors that start anew, and those of `state` that are left behind."""
    if network.config.null_text == "clip":
        return (
            f"{', '.join(_LEARNED_NULL)} (learned for dropped captions) left behind, the CLIP's features of '' take "
            "their place",
            list(_CLIP_NULL),
            list(_LEARNED_NULL),
        )
    if network.text_encoder is not None or not bool(torch.any(state["clip_null_mask"])):
        return "what stands for a dropped caption is learned anew", list(_LEARNED_NULL), list(_CLIP_NULL)
    before = start.config
    scale = before.text_scale or (before.embedding_dim**0.5 if before.embedding_length == "unit" else 1.0)
    for name, given, layer in (
        ("null_tokens", state["clip_null_tokens"], "token_in"),
        ("null_text", state["clip_null_embedding"] * scale, "text_in"),
    ):
        state[name] = given @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
    return (
        f"{_CLIP_NULL[1]} left behind; what stands for a dropped caption is learned from here on, and begins with "
        "the CLIP's features of ''",
        [],
        list(_CLIP_NULL),
    )
