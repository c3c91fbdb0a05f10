"""Configuration of a frozen autoencoder in whose latents a network works."""

from __future__ import annotations

from pydantic import Field, model_validator

from unclip.config_base import Config


class LatentConfig(Config):
    """The latents of a frozen autoencoder, in which a network works (Latent Diffusion, §3). What is not the name is
    read from the autoencoder when training.
    """

    name: str = Field(description="a folder or a Hub id of an AutoencoderKL or VQModel in diffusers' layout")
    channels: int = Field(4, ge=1)
    factor: int = Field(8, ge=1, description="pixels a latent's side")
    scale: float = Field(0.18215, gt=0, description="brings latents to about unit variance")
    shift: float = 0.0
    tile: int | None = Field(
        None,
        ge=1,
        description="edge in pixels of the overlapping tiles that an AutoencoderKL reads and makes larger pictures in; "
        "null: pictures whole",
    )

    @model_validator(mode="after")
    def _tiles_are_whole(self) -> LatentConfig:
        if self.tile is not None and "factor" in self.model_fields_set and self.tile % (4 * self.factor):
            raise ValueError(
                f"tile {self.tile} is no multiple of {4 * self.factor} pixels: a quarter of a tile overlaps the next, "
                "by whole latents"
            )
        return self


def check_latent(latent: LatentConfig | None, variance: str, network: str) -> None:
    """ValueError for a learned variance in latents."""
    if latent is not None and variance == "learned_range":
        raise ValueError(
            f"a learned variance is trained on the likelihood of pixels, and this {network} works in latents; set "
            "diffusion.variance to fixed_small"
        )
