"""Low-rank adapters as runs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from decoder import DecoderStage
from prior import PriorStage
from unclip.config import TrainConfig, parse_config
from unclip.training.finetune import Tuning
from upsamplers import UpsamplerStage


def tuned(network: nn.Module, kind: str, folder: Path, **lora: Any) -> Tuning:
    train = parse_config(TrainConfig, {"run_dir": str(folder), "lora": {"rank": 4, **lora}})
    return Tuning(network, train, kind, network.config)


def shake(network: nn.Module, size: float = 0.3) -> None:
    """Adapters that say something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size)


def make_adapters(tiny_bundle: Path, root: Path) -> dict[str, Path]:
    """Adapters of the tiny bundle's prior, decoder and second upsampler, as runs write them."""
    for name, loader in (("prior", PriorStage), ("decoder", DecoderStage), ("upsampler_1024", UpsamplerStage)):
        stage: Any = loader.load(tiny_bundle / name)  # type: ignore[attr-defined]
        network = stage.network.requires_grad_(True)
        network.config = stage.config
        kind = name.partition("_")[0]
        target = "conv" if kind == "upsampler" else "attention"
        tuning = tuned(network, kind, root / name, target=[target], export="adapter")
        shake(network, 0.5)
        tuning.exporting(lambda _state, _folder: None)(network.state_dict(), root / name / "model")
    return {name: root / name / "adapter" for name in ("prior", "decoder", "upsampler_1024")}
