"""Sampling image embeddings from captions, with either prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prior.autoregressive import AutoregressivePrior
from prior.conditioning import text_embedding
from prior.config import CONFIGS, AutoregressivePriorConfig, PriorConfig, kind_of
from prior.dalle2 import Dalle2Prior, Dalle2PriorConfig, length_clip
from prior.network import Prior
from unclip.bundle import load_network, load_weights, read_part_json, read_statistics
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import (
    Denoiser,
    GaussianDiffusion,
    SeededNoise,
    clip_from,
    get_sampler,
    make_denoiser,
    static_clip,
    timesteps_from,
)
from unclip.diffusion.samplers import Callback
from unclip.errors import UnclipError, UsageError
from unclip.nn.prepared import PreparedNetwork

KIND = "prior"
AnyPrior: TypeAlias = PriorConfig | AutoregressivePriorConfig | Dalle2PriorConfig
_KINDS: dict[str, type[AnyPrior]] = {**CONFIGS, "dalle2": Dalle2PriorConfig}  # CONFIGS are those that can be trained


class PriorStage(ABC):
    """A trained prior, ready to sample. `PriorStage.load` gives the kind that the folder holds."""

    def __init__(
        self, network: nn.Module, config: AnyPrior, device: torch.device | str = "cpu"
    ) -> None:
        self.network: Any = network.eval()
        self.config = config
        self.device = torch.device(device)

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PriorStage:
        """Read a part written by `train_prior.py`. Raises UnclipError when it is incomplete or does not fit."""
        config, state = read_prior_config(folder), load_weights(folder)
        stage = build_stage(config, load_network(lambda: _fresh(config), state, folder))
        statistics = read_statistics(folder)
        if statistics is not None and isinstance(stage, DiffusionPriorStage):
            stage.process.use_statistics(statistics)
        stage.network.to(device).requires_grad_(False)
        stage.hold_in(dtype)
        stage.device = torch.device(device)
        return stage

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keep the weights in this precision, and compute in it; the embeddings' statistics stay float32."""
        for parameter in self.network.parameters():
            parameter.data = parameter.data.to(dtype)

    @abstractmethod
    def check_options(self, steps: Any = None, sampler: str | None = None) -> None:
        """UsageError when this prior cannot follow these options of `sample`."""

    @abstractmethod
    def sample(
        self,
        text: TextFeatures,
        seeds: Sequence[int],
        *,
        steps: Any = None,
        guidance: float | None = None,
        sampler: str | None = None,
        candidates: int | None = None,
        negative: TextFeatures | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Captions' features (B) and one seed each -> image embeddings (B, E), float32, of the length that
        `embedding_length` names. None means the model's own default.

        Of `candidates` samples a caption the one with the largest dot product with the text embedding is kept (unCLIP
        §2.2). `negative` (B): captions to move away from, which take the place of no caption in guidance, and so act
        where its scale is not 1. The callback hears (number, total, embeddings so far) after each step.
        Raises UnclipError: features that do not fit this prior or the number of seeds. UsageError: options that it
        cannot follow, no candidates.
        """

    def _prepare(
        self,
        text: TextFeatures,
        seeds: Sequence[int],
        candidates: int | None,
        scale: float,
        negative: TextFeatures | None = None,
    ) -> _Draft:
        number = self.config.candidates if candidates is None else candidates
        if number < 1:
            raise UsageError(f"candidates is {number}; at least one sample a caption must be drawn")
        self._check(text, len(seeds))
        if negative is not None:
            self._check(negative, len(seeds))
        if scale != 1 and negative is None and not self.network.has_null:
            raise UnclipError(
                "guidance needs the CLIP's features of the empty text, which stand for no caption in this prior, and "
                "they are not stored with it; store them with `store_null`, or take guidance 1"
            )
        text = text.to(self.device)
        embedding = text_embedding(text, self.config.embedding_length)
        index = torch.arange(len(seeds), device=self.device).repeat_interleave(number)
        dtype = next(self.network.parameters()).dtype

        def read(features: TextFeatures) -> dict[str, Tensor]:
            features = features.to(self.device)
            condition = {
                "text_embedding": text_embedding(features, self.config.embedding_length)[index],
                "text_tokens": features.tokens[index],
                "text_mask": features.mask[index],
                "drop_text": torch.zeros(len(index), dtype=torch.bool, device=self.device),
            }
            return {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}

        # A candidate's noise hangs on its caption's seed and its own number alone, whatever else is in the batch.
        own = [seed * 1_000_003 + candidate for seed in seeds for candidate in range(number)]
        return _Draft(read(text), embedding, own, number, None if negative is None else read(negative))

    def _check(self, text: TextFeatures, count: int) -> None:
        tokens = (count, self.config.text_length, self.config.token_dim)
        embedding = (count, self.config.embedding_dim)
        if text.tokens.shape != tokens or text.embedding.shape != embedding:
            raise UnclipError(
                f"text tokens of shape {tuple(text.tokens.shape)} and embeddings of shape "
                f"{tuple(text.embedding.shape)} for "
                f"{count} seeds; this prior takes {tokens} and {embedding}, as the CLIP it was trained with gives them"
            )

    def _finish(self, embedding: Tensor, draft: _Draft) -> Tensor:
        if self.config.embedding_length == "unit":
            embedding = F.normalize(embedding, dim=1)
        return best_of(embedding.unflatten(0, (-1, draft.candidates)), draft.embedding)


class _Draft:
    """What is to be drawn: conditions repeated for every candidate, and a seed each."""

    def __init__(
        self,
        condition: dict[str, Tensor],
        embedding: Tensor,
        seeds: list[int],
        candidates: int,
        negative: dict[str, Tensor] | None = None,
    ) -> None:
        self.condition, self.embedding, self.seeds, self.candidates = condition, embedding, seeds, candidates
        self.negative = negative

    @property
    def null(self) -> dict[str, Tensor]:
        """What guidance moves away from: no caption, or the negative one."""
        if self.negative is not None:
            return self.negative
        return {**self.condition, "drop_text": torch.ones_like(self.condition["drop_text"])}


class DiffusionPriorStage(PriorStage):
    """A trained diffusion prior, ready to sample."""

    network: Prior | Dalle2Prior
    config: PriorConfig | Dalle2PriorConfig

    def __init__(
        self, network: nn.Module, config: PriorConfig | Dalle2PriorConfig, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(network, config, device)
        self.process = GaussianDiffusion(config.diffusion)

    def check_options(self, steps: Any = None, sampler: str | None = None) -> None:
        timesteps_from(self.config.steps if steps is None else steps, self.process.timesteps)
        get_sampler(sampler or self.config.sampler)

    @torch.inference_mode()
    def sample(
        self,
        text: TextFeatures,
        seeds: Sequence[int],
        *,
        steps: Any = None,
        guidance: float | None = None,
        sampler: str | None = None,
        candidates: int | None = None,
        negative: TextFeatures | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        config = self.config
        scale = config.guidance if guidance is None else guidance
        draft = self._prepare(text, seeds, candidates, scale, negative)
        own = None if config.clip_range is None else static_clip(config.clip_range)
        if isinstance(config, Dalle2PriorConfig) and config.clamp_length:
            own = length_clip(config.image_scale)
        clip = clip_from(config.diffusion.x_start_clip, own)
        denoiser = make_denoiser(self._prepared(), self.process, draft.condition, draft.null, scale, clip)
        kept = self.process.steps(timesteps_from(config.steps if steps is None else steps, self.process.timesteps))
        noise = SeededNoise(draft.seeds)
        x = noise.draw((config.embedding_dim,), self.device)
        x = get_sampler(sampler or config.sampler)(denoiser, x, kept, noise, callback=callback)
        return self._finish(self.network.denormalise(x).float(), draft)

    def conditional(self, text: TextFeatures) -> Denoiser:
        """The denoiser of these captions, one embedding each, without guidance or clipping."""
        draft = self._prepare(text, [0] * len(text), 1, 1.0)
        return make_denoiser(self._prepared(), self.process, draft.condition)

    def _prepared(self) -> PreparedNetwork:
        """The network, which reads a caption once for all steps."""
        dtype = next(self.network.parameters()).dtype
        return PreparedNetwork(
            self.network.read, lambda x, t, prefix: self.network.continued(x.to(dtype), t, prefix)
        )


class AutoregressivePriorStage(PriorStage):
    """A trained autoregressive prior, ready to sample: one code for each principal component, by falling eigenvalue."""

    network: AutoregressivePrior
    config: AutoregressivePriorConfig

    def check_options(self, steps: Any = None, sampler: str | None = None) -> None:
        for name, value in (("steps", steps), ("sampler", sampler)):
            if value is not None:
                raise UsageError(
                    f"{name} {value} is asked of the prior, which is autoregressive: it draws one code for each of "
                    f"{self.config.components} components and has no steps or sampler to choose; leave {name} away"
                )

    @torch.inference_mode()
    def sample(
        self,
        text: TextFeatures,
        seeds: Sequence[int],
        *,
        steps: Any = None,
        guidance: float | None = None,
        sampler: str | None = None,
        candidates: int | None = None,
        negative: TextFeatures | None = None,
        callback: Callback | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        dot_percentile: float | None = None,
    ) -> Tensor:
        """As PriorStage.sample; `steps` and `sampler` are refused. Guidance mixes logits: l(∅) + s · (l(y) − l(∅)).
        A negative caption is read with the same token for its dot product as the caption.

        The dot product's token is drawn above `dot_percentile` of the measured distribution (unCLIP §2.2, App. C).
        """
        config = self.config
        self.check_options(steps, sampler)
        heat = _within("temperature", config.temperature if temperature is None else temperature, 0)
        mass = _within("top_p", config.top_p if top_p is None else top_p, 0, 1)
        percentile = _within(
            "dot_percentile", config.dot_percentile if dot_percentile is None else dot_percentile, 0, 0.999
        )
        scale = config.guidance if guidance is None else guidance
        draft = self._prepare(text, seeds, candidates, scale, negative)
        total = self.network.codes.components.shape[0]
        generators = [torch.Generator().manual_seed(seed) for seed in draft.seeds]
        uniform = torch.stack([torch.rand(total + 1, generator=g, dtype=torch.float64) for g in generators])
        uniform = uniform.to(self.device)
        dot = self.network.dots.draw(uniform[:, 0], percentile)
        guided = scale != 1
        condition = {**draft.condition, "dot": dot}
        if guided:
            null = {**draft.null, "dot": dot}
            condition = {name: torch.cat([condition[name], null[name]]) for name in condition}
        logits, generation = self.network.start(**condition)
        drawn: list[Tensor] = []
        for number in range(total):
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + scale * (conditional - unconditional)
            drawn.append(draw_codes(logits, uniform[:, number + 1], heat, mass))
            if callback is not None:
                callback(number + 1, total, self.network.codes.decode(torch.stack(drawn, 1)))
            if number < total - 1:
                logits = self.network.advance(generation, torch.cat([drawn[-1]] * (2 if guided else 1)))
        return self._finish(self.network.codes.decode(torch.stack(drawn, 1)).float(), draft)


def draw_codes(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """logits (B, V), uniform (B,) in [0, 1) -> codes (B,) by the inverse of the distribution function over the codes in
    their order, so that a small error of the logits moves a code to its neighbour at most.

    Temperature 0 takes the likeliest. top_p keeps the fewest likeliest codes that hold this much of the probability
    (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(1)
    probability = torch.softmax(logits.double() / temperature, dim=1)
    if top_p < 1:
        ordered, places = probability.sort(dim=1, descending=True)
        # What comes before a code, without itself: the likeliest is always kept.
        beyond = ordered.cumsum(1) - ordered >= top_p
        probability = probability.scatter(1, places, ordered.masked_fill(beyond, 0))
    cumulative = probability.cumsum(1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def best_of(candidates: Tensor, text_embedding: Tensor) -> Tensor:
    """candidates (B, N, E), text_embedding (B, E) -> (B, E): for each caption the candidate of largest dot product."""
    # Not as a matrix product, which autocast would round: candidates differ by less than bfloat16 tells apart.
    scores = (candidates.float() * text_embedding[:, None].float()).sum(dim=2)
    return candidates[torch.arange(len(candidates)), scores.argmax(dim=1)]


def build_network(config: PriorConfig | AutoregressivePriorConfig) -> Prior | AutoregressivePrior:
    """The network that a configuration describes, with fresh weights."""
    return AutoregressivePrior(config) if isinstance(config, AutoregressivePriorConfig) else Prior(config)


def build_stage(
    config: AnyPrior,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> PriorStage:
    """The stage of a configuration around `network`, by default one with fresh weights."""
    network = _fresh(config) if network is None else network
    if isinstance(config, AutoregressivePriorConfig):
        return AutoregressivePriorStage(network, config, device)
    return DiffusionPriorStage(network, config, device)


def _fresh(config: AnyPrior) -> nn.Module:
    return Dalle2Prior(config) if isinstance(config, Dalle2PriorConfig) else build_network(config)


def read_prior_config(folder: Path) -> AnyPrior:
    """The configuration of a prior's folder, of the class that its `kind` names. Raises UnclipError."""
    body = read_part_json(folder, KIND)["config"]
    file = folder / "config.json"
    if not isinstance(body, dict) or kind_of(body) not in _KINDS:
        known = ", ".join(_KINDS)
        kind = kind_of(body) if isinstance(body, dict) else type(body).__name__
        raise UnclipError(f"{file} describes a prior of kind {kind!r}; this version knows {known}")
    return parse_config(_KINDS[kind_of(body)], body, origin=str(file))


def _within(name: str, value: float, low: float, high: float = float("inf")) -> float:
    if not low <= value <= high or value == float("inf") or (name == "top_p" and value == 0):
        bound = f"{low} or more" if high == float("inf") else f"{low} to {high}"
        raise UsageError(f"{name} is {value}, expected a number of {bound}")
    return value
