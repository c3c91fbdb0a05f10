"""A decoder that starts from a trained one: what is carried over, and what starts anew."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.config import DecoderConfig, DecoderRunConfig
from decoder.dalle2 import Dalle2DecoderConfig
from decoder.network import Decoder
from decoder.sampling import KIND, read_decoder_config
from unclip.bundle import load_weights
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.training.start import Reader, Start, carry_over, inherited, open_start

# They end in zeros, and change nothing until they have learned.
_MAY_START_FRESH = ("noise_level_to_time.", "embedding_features.", "features_to_", "text_seed.", "unet.refiner.")
_NULLS = ("null_text", "null_mask", "null_text_embedding")
_READS_CAPTIONS = (  # beside the nulls
    "text_transformer.", "text_to_tokens.", "text_norm.", "last_token_to_time.", "text_seed.",
)  # fmt: skip


def read_part(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """A decoder part's configuration and weights."""
    return read_shape(folder)[0], load_weights(folder)


def read_shape(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """As `read_part`, without the weights. Raises UnclipError: a decoder that is only run here."""
    config = read_decoder_config(folder)
    if isinstance(config, Dalle2DecoderConfig):
        raise UnclipError(
            f"{folder} holds a decoder of DALLE2-pytorch, which is run here and not trained; start from another"
        )
    return config, {}


def with_start(
    config: DecoderRunConfig, foreign: Reader | None = None, read: Reader = read_part
) -> tuple[DecoderRunConfig, Start | None]:
    """Open what `init_from` names, and fill in what `model` leaves out as it is there. Raises as `open_start`."""
    if config.init_from is None:
        return config, None
    start = open_start(config.init_from, KIND, read, foreign=foreign, weights=read is read_part)
    model = parse_config(DecoderConfig, inherited(start, config.model), origin=f"model, with {start.folder}")
    return config.model_copy(update={"model": model}), start


def start_from(network: Decoder, folder: Path) -> str | None:
    """`begin_from` a decoder's folder."""
    return begin_from(network, Start(folder, *read_part(folder)))


def begin_from(network: Decoder, start: Start) -> str | None:
    """Load a trained decoder's weights of the same shape. Returns a sentence on what starts anew, if anything does.

    Where it predicts another quantity (ε, x_0, v), the output layer keeps its fresh zeros: it would put out the wrong
    thing, while the features below it serve as well. An inpainting decoder may start from one that is none: the
    weights of its additional input channels are zero, so that it begins by painting as the other did (GLIDE, §3.3).
    The same holds for what tells the network the embedding's noise level, for a hidden layer that reads the embedding,
    for a map of the caption, and for a refiner. Where captions come in another form (`text.kind`), what reads them
    starts anew. Where one drops captions by learned rows and the other by the CLIP's features of '', see `_null_text`.
    Raises UnclipError: the weights do not fit otherwise.
    """
    before, config, state, own = start.config, network.config, dict(start.state), network.state_dict()
    notes = []
    if before.inpainting and not config.inpainting:
        raise UnclipError(
            f"{start.folder} holds an inpainting decoder; a decoder that does not inpaint cannot start from it"
        )
    if config.inpainting and not before.inpainting:
        name = "unet.conv_in.weight"
        missing = own[name].shape[1] - state[name].shape[1]
        if missing > 0:
            state[name] = F.pad(state[name], (0, 0, 0, 0, 0, missing))
    fresh = [name for name in own if name not in state and name.startswith(_MAY_START_FRESH)]
    if before.diffusion.prediction != config.diffusion.prediction:
        fresh += [name for name in own if name.startswith("unet.conv_out.")]
        notes.append(
            f"the output layer starts anew, as it predicted {before.diffusion.prediction} and now predicts "
            f"{config.diffusion.prediction}"
        )
    left, kept, note = _null_text(network, before, state)
    notes += [note] if note else []
    if before.text.kind != config.text.kind:
        left = [*left, *filter(_reads_captions, state)]
        fresh += filter(_reads_captions, own)
        if network.text_transformer is not None:  # its context is new to the U-Net, and that is change enough
            nn.init.zeros_(network.last_token_to_time.weight)
            nn.init.zeros_(network.last_token_to_time.bias)
        notes.append(
            f"what reads captions starts anew, as they came as text.kind {before.text.kind!r} and now come as "
            f"{config.text.kind!r}"
        )
    carry_over(network, Start(start.folder, before, state), KIND, fresh=[*fresh, *kept], left=left)
    return f"from {start.folder}: {'; '.join(notes)}" if notes else None


def _reads_captions(name: str) -> bool:
    return name.startswith(_READS_CAPTIONS) or name in ("null_text", "null_mask")


def _null_text(network: Decoder, before: DecoderConfig, state: dict[str, Tensor]) -> tuple[list[str], list[str], str]:
    """What stands for a dropped caption: tensors that are left behind, those that start anew, and a note.

    The CLIP's features of '' become the first values of learned rows. Learned rows are no use to a decoder that takes
    the CLIP's features: it gets them from its own CLIP, as always when it trains.
    """
    config, own = network.config, network.state_dict()
    if before.null_text == config.null_text:
        if config.null_text == "learned":
            return [], [], ""
        changed = [name for name in _NULLS if name in state and name in own and state[name].shape != own[name].shape]
        return changed, changed, ""
    if config.null_text == "clip":
        left = [name for name in _NULLS if name in state]
        return left, [name for name in _NULLS if name in own], (
            f"{', '.join(left)} (learned for dropped captions) left behind, the CLIP's features of '' take their place"
        )
    left = ["null_mask"]
    if not config.text_embedding_to_time:
        left.append("null_text_embedding")
    elif not before.text_embedding_to_time:
        left.append("null_text_embedding")  # never used there
    else:
        state["null_text_embedding"] = state["null_text_embedding"] * before.scale
    if not bool(torch.any(state["null_mask"])):  # a converted checkpoint that was never given the features
        unset = [name for name in _NULLS if name in own]
        return list(_NULLS), unset, "what stands for a dropped caption is learned anew"
    kept = ["null_text_embedding"] if config.text_embedding_to_time and not before.text_embedding_to_time else []
    return left, kept, (
        f"{', '.join(left)} left behind; what stands for a dropped caption is learned from here on, and begins with "
        "the CLIP's features of ''"
    )
