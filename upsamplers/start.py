"""An upsampler that starts from a trained one: what is carried over, and what starts anew."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from unclip.bundle import load_weights
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.training.start import Reader, Start, carry_over, inherited, open_start
from upsamplers.config import UpsamplerConfig, UpsamplerRunConfig
from upsamplers.dalle2 import Dalle2UpsamplerConfig
from upsamplers.network import Upsampler
from upsamplers.sampling import KIND, read_upsampler_config

_PARTS = ("upsampler_256", "upsampler_1024")


def read_part(folder: Path) -> tuple[UpsamplerConfig, dict[str, Tensor]]:
    """An upsampler part's configuration and weights."""
    return read_shape(folder)[0], load_weights(folder)


def read_shape(folder: Path) -> tuple[UpsamplerConfig, dict[str, Tensor]]:
    """As `read_part`, without the weights. Raises UnclipError: an upsampler that is only run here."""
    config = read_upsampler_config(folder)
    if isinstance(config, Dalle2UpsamplerConfig):
        raise UnclipError(
            f"{folder} holds an upsampler of DALLE2-pytorch, which is run here and not trained; start from another"
        )
    return config, {}


def with_start(
    config: UpsamplerRunConfig, foreign: Reader | None = None, read: Reader = read_part
) -> tuple[UpsamplerRunConfig, Start | None]:
    """Open what `init_from` names, of a bundle the upsampler to data.image_size, and fill in what `model` leaves out as
    it is there. Raises as `open_start`; UsageError: sizes that do not agree.
    """
    if config.init_from is None:
        return config, None

    def wanted(folder: Path) -> bool:
        return read_upsampler_config(folder).high_size == config.data.image_size

    start = open_start(
        config.init_from, KIND, read, foreign=foreign, parts=_PARTS, wanted=wanted, weights=read is read_part
    )
    body = {**config.model_dump(), "model": inherited(start, config.model)}
    return parse_config(UpsamplerRunConfig, body, origin=f"the configuration, with {start.folder}"), start


def start_from(network: Upsampler, folder: Path) -> str | None:
    """`begin_from` an upsampler's folder."""
    return begin_from(network, Start(folder, *read_part(folder)))


def begin_from(network: Upsampler, start: Start) -> str | None:
    """Load a trained upsampler's weights of the same shape. Returns a sentence on what starts anew, if anything does.

    What it lacks and `network` has starts anew, except a last-step network: that one starts as a copy of the trained
    network, to be fine-tuned for its step (Karlo). Where it predicts another quantity (ε, x_0, v), the output layers
    keep their fresh zeros, as it would put out the wrong thing. UnclipError: weights that do not fit.
    """
    before, config, state = start.config, network.config, dict(start.state)
    fresh: list[str] = []
    notes = []
    if config.last_step_network and not before.last_step_network:
        state |= {
            name.replace("unet.", "last_unet.", 1): value for name, value in state.items() if name.startswith("unet.")
        }
    if before.diffusion.prediction != config.diffusion.prediction or before.residual != config.residual:
        fresh += [name for name in network.state_dict() if "unet.conv_out." in name]
        notes.append("the output layer starts anew, as it predicted something else")
    if before.noise_augmentation is None and config.noise_augmentation is not None:
        fresh += [name for name in network.state_dict() if name.startswith("level_embed.")]
        notes.append("the input for the condition's noise level starts anew")
    carry_over(network, Start(start.folder, before, state), KIND, fresh=fresh)
    return f"from {start.folder}: {'; '.join(notes)}" if notes else None
