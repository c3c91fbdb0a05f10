"""The diffusion prior beside diffusers' PriorTransformer (same weights) and dalle2-pytorch's (equal size)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import peer_dalle2, peer_diffusers
from benchmarks.contest import Contestant, parameters_of, training_step
from benchmarks.lineup import lineup, loaded, ours
from benchmarks.shapes import PriorShape, captions, empty_caption, kept_timesteps, rand, timesteps
from prior import DiffusionPriorStage, Prior, PriorConfig, PriorStage
from prior.sampling import KIND
from unclip.config import parse_config
from unclip.interop.prior import prior_from_diffusers


def contestants(shape: PriorShape, device: torch.device, compiled: bool = False) -> list[Contestant]:
    """Ours in eager float32 and with its defaults, then the peers that are installed."""
    return lineup(
        _Bench(shape, device), device, compiled, lambda parameters: peer_dalle2.prior(shape, parameters, device)
    )


class _Bench:
    """One set of weights and inputs for all of them."""

    def __init__(self, shape: PriorShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.seeds = list(range(shape.batch))
        self.text = captions(shape.batch, shape.tokens, shape.embedding).to(device)
        self.null = empty_caption(shape.tokens, shape.embedding).to(device)
        self.x = rand(shape.batch, shape.embedding, seed=7).to(device)
        self.target = rand(shape.batch, shape.embedding, seed=8).to(device)
        self.t = timesteps(shape.batch).to(device)
        options = {"steps": kept_timesteps(shape.steps), "guidance": shape.guidance}
        self.theirs = None
        torch.manual_seed(0)
        if peer_diffusers.INSTALLED:
            from diffusers import PriorTransformer

            self.theirs = PriorTransformer(
                num_attention_heads=shape.heads,
                attention_head_dim=shape.head_dim,
                num_layers=shape.depth,
                embedding_dim=shape.embedding,
                num_embeddings=shape.tokens,
            ).eval()
            with torch.no_grad():
                self.theirs.clip_std.fill_(1.0)
            found = prior_from_diffusers(
                self.theirs.state_dict(), dict(self.theirs.config), self.null.to("cpu"), **options
            )
            self.config, self.state = found
            self.theirs = self.theirs.to(device)
        else:
            width = shape.heads * shape.head_dim
            sizes = {"width": width, "depth": shape.depth, "heads": shape.heads, "text_length": shape.tokens}
            dims = {"embedding_dim": shape.embedding, "token_dim": shape.embedding, "candidates": 1}
            karlo = {"attention_bias": True, "norm_bias": True, "embedding_length": "raw"}
            self.config = parse_config(PriorConfig, {**sizes, **dims, **karlo, **options})
            self.state = Prior(self.config).state_dict()

    def ours(self, name: str, reduced: bool, compiled: bool) -> Contestant:
        """`reduced`: bfloat16, as `PriorStage.load` gives it on a device that has it."""
        stage: PriorStage
        if name.endswith("defaults"):
            stage = loaded(PriorStage, KIND, self.config, self.state, self.device, reduced)
        else:
            stage = DiffusionPriorStage(Prior(self.config).to(self.device), self.config, self.device)
            stage.network.load_state_dict(self.state)
            stage.network.requires_grad_(False)
        training = Prior(self.config).to(self.device)
        training.load_state_dict(self.state)
        network = stage.network
        dtype = next(network.parameters()).dtype
        assert self.text.norm is not None
        condition = {
            "text_embedding": self.text.embedding * self.text.norm[:, None],
            "text_tokens": self.text.tokens,
            "text_mask": self.text.mask,
            "drop_text": torch.zeros(self.shape.batch, dtype=torch.bool, device=self.device),
        }
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in condition.items()}
        x = self.x.to(dtype)

        @torch.inference_mode()
        def forward() -> Tensor:
            return network(x, self.t, **cast)  # type: ignore[no-any-return]

        return ours(
            name,
            network,
            training,
            compiled,
            forward=forward,
            run=lambda net: net(self.x, self.t, **condition),
            target=self.target,
            reduced=reduced,
            sampling=lambda: stage.sample(self.text, self.seeds),
        )

    def diffusers(self) -> Contestant:
        network, text, null, shape = self.theirs, self.text, self.null, self.shape
        assert network is not None and text.norm is not None and null.norm is not None
        embedding = text.embedding * text.norm[:, None]
        # As the pipeline orders them: without the caption, then with it.
        both = {
            "proj_embedding": torch.cat([(null.embedding * null.norm[:, None]).expand(shape.batch, -1), embedding]),
            "encoder_hidden_states": torch.cat([null.tokens.expand(shape.batch, -1, -1), text.tokens]),
            "attention_mask": torch.cat([null.mask.expand(shape.batch, -1), text.mask]),
        }

        def run(net: torch.nn.Module) -> Tensor:
            out = net(
                self.x,
                self.t,
                proj_embedding=embedding,
                encoder_hidden_states=text.tokens,
                attention_mask=text.mask,
            )
            return out.predicted_image_embedding  # type: ignore[no-any-return]

        def guided(x: Tensor, t: Tensor) -> Tensor:
            out = network(torch.cat([x] * 2), timestep=t, **both).predicted_image_embedding
            before, after = out.chunk(2)
            return before + shape.guidance * (after - before)  # type: ignore[no-any-return]

        betas = torch.from_numpy(DiffusionPriorStage(Prior(self.config), self.config).process.betas)
        own = [seed * 1_000_003 for seed in self.seeds]  # the noise of a seed's first candidate

        def sampled() -> Tensor:
            scheduler = peer_diffusers.unclip_scheduler(
                betas,
                kept_timesteps(shape.steps),
                variance_type="fixed_small_log",
                prediction_type="sample",
                clip_sample_range=self.config.clip_range,
            )
            x = peer_diffusers.sample(scheduler, guided, (shape.embedding,), own, self.device)
            return network.post_process_latents(x)  # type: ignore[no-any-return]

        works = {
            "forward": torch.inference_mode()(lambda: run(network)),
            "training step": training_step(network, run, self.target),
            "sampling": sampled,
        }
        return Contestant("diffusers", parameters_of(network) - 2 * shape.embedding, works, tuple(works))
