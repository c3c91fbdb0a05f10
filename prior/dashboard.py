"""What a prior's loss does not tell: how near its samples come to the images' embeddings, and to the captions'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prior.conditioning import text_embedding
from prior.config import AutoregressivePriorConfig, PriorConfig
from prior.sampling import build_stage
from unclip.clip import TextFeatures
from unclip.config import DataConfig
from unclip.training.previews import fixed_batch

_BATCH = 64


class Dashboard:
    """Samples one embedding a caption for always the same captions, with the same noise, and compares them.

    `embed(batch)` gives a batch's image embeddings and text features. Samples are drawn as the model is by default, but
    without choosing among candidates.
    """

    def __init__(
        self,
        model: PriorConfig | AutoregressivePriorConfig,
        data: DataConfig,
        embed: Callable[[Any], tuple[Tensor, TextFeatures]],
        device: torch.device,
        count: int,
    ) -> None:
        self.model, self.data, self.embed, self.device, self.count = model, data, embed, device, count
        self._fixed: tuple[Tensor, TextFeatures, list[str]] | None = None

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float]:
        if self._fixed is None:
            batch = fixed_batch(self.data, self.count)
            self._fixed = (*self.embed(batch), list(batch["caption"]))
        real, text, captions = self._fixed
        stage = build_stage(self.model, network, self.device)
        # The statistics of Analytic-DPM are measured when training ends.
        sampler = "ddpm" if getattr(self.model, "sampler", None) == "analytic" else None
        drawn = [
            stage.sample(text[part], range(part.start, part.stop), candidates=1, sampler=sampler)
            for part in (slice(i, min(i + _BATCH, len(captions))) for i in range(0, len(captions), _BATCH))
        ]
        return cosines(torch.cat(drawn), real, text_embedding(text, self.model.embedding_length), captions)


def cosines(prediction: Tensor, real: Tensor, text: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mean cosines of predicted, real and text embeddings, each (B, E), of B captions.

    `cos_prediction_real` is what a prior is for: 1 would be a perfect one, `cos_text_real` is that of taking the text's
    embedding for the image's, and `cos_real_unrelated`, that of two real ones, what knowing no caption gives.
    `cos_text_prediction` belongs near `cos_text_real`: above it a prior exaggerates its caption, below it does not heed
    it. `cos_prediction_unrelated` belongs near `cos_real_unrelated`: above it samples look alike. Unrelated means all
    pairs of samples with different captions; where there are none, those are left out.
    """
    p, r, t = (F.normalize(x.double().cpu(), dim=1) for x in (prediction, real, text))
    told = {
        "cos_text_real": (t * r).sum(1).mean(),
        "cos_prediction_real": (p * r).sum(1).mean(),
        "cos_text_prediction": (t * p).sum(1).mean(),
    }
    number = {caption: index for index, caption in enumerate(captions)}
    label = torch.tensor([number[caption] for caption in captions])
    unrelated = label[:, None] != label
    if unrelated.any():
        told |= {
            "cos_prediction_unrelated": (p @ r.T)[unrelated].mean(),
            "cos_text_unrelated": (t @ r.T)[unrelated].mean(),
            "cos_real_unrelated": (r @ r.T)[unrelated].mean(),
        }
    return {name: float(value) for name, value in told.items()}
