"""The decoder beside diffusers' UNet2DConditionModel with UnCLIPTextProjModel (same weights) and dalle2-pytorch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peer_dalle2, peer_diffusers
from benchmarks.contest import Contestant, parameters_of, training_step
from benchmarks.lineup import lineup, loaded, ours
from benchmarks.shapes import UNetShape, captions, empty_caption, kept_timesteps, rand, timesteps
from decoder import Decoder, DecoderConfig, DecoderStage
from decoder.sampling import KIND
from unclip.config import parse_config
from unclip.interop.decoder import decoder_from_diffusers


def contestants(shape: UNetShape, device: torch.device, compiled: bool = False) -> list[Contestant]:
    """Ours in eager float32 and with its defaults, then the peers that are installed."""
    return lineup(
        _Bench(shape, device), device, compiled, lambda parameters: peer_dalle2.decoder(shape, parameters, device)
    )


class _Theirs(nn.Module):
    """diffusers keeps the U-Net and the projections of its conditioning in two models."""

    def __init__(self, unet: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.unet, self.projection = unet, projection

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added: Tensor, mask: Tensor) -> Tensor:
        out = self.unet(x, t, encoder_hidden_states=context, class_labels=added, attention_mask=mask)
        return out.sample  # type: ignore[no-any-return]


class _Bench:
    """One set of weights and inputs for all of them."""

    def __init__(self, shape: UNetShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.seeds = list(range(shape.batch))
        self.text = captions(shape.batch, shape.tokens, shape.embedding).to(device)
        self.null = empty_caption(shape.tokens, shape.embedding).to(device)
        self.image = 5 * F.normalize(rand(shape.batch, shape.embedding, seed=3), dim=1).to(device)
        self.x = rand(shape.batch, 3, shape.image, shape.image, seed=7).to(device)
        self.target = rand(shape.batch, 6, shape.image, shape.image, seed=8).to(device)
        self.t = timesteps(shape.batch).to(device)
        self.theirs = None
        torch.manual_seed(0)
        options = {"steps": kept_timesteps(shape.steps), "guidance": shape.guidance}
        if peer_diffusers.INSTALLED:
            self.theirs = their_network(shape).eval()
            models = [(part.state_dict(), dict(part.config)) for part in (self.theirs.unet, self.theirs.projection)]
            self.config, self.state = decoder_from_diffusers(
                models[0], models[1], self.null.to("cpu"), text_length=shape.tokens, **options
            )
            self.theirs = self.theirs.to(device)
        else:
            levels = len(shape.widths)
            mults = [width / shape.widths[0] for width in shape.widths]
            unet = {
                "image_size": shape.image,
                "model_channels": shape.widths[0],
                "channel_mult": [int(mult) if mult == int(mult) else mult for mult in mults],
                "num_res_blocks": shape.blocks,
                "attention_resolutions": [shape.image // 2**level for level in range(1, levels)],
                "head_channels": shape.head_dim,
            }
            dims = {"embedding_dim": shape.embedding, "token_dim": shape.embedding, "text_length": shape.tokens}
            self.config = parse_config(
                DecoderConfig,
                {
                    **dims,
                    "context_dim": shape.context,
                    "embedding_length": "raw",
                    "text_embedding_to_time": True,
                    "unet": unet,
                    **options,
                },
            )
            self.state = Decoder(self.config).state_dict()

    def ours(self, name: str, reduced: bool, compiled: bool) -> Contestant:
        """`reduced`: bfloat16, as `DecoderStage.load` gives it on a device that has it."""
        if name.endswith("defaults"):
            stage = loaded(DecoderStage, KIND, self.config, self.state, self.device, reduced)
        else:
            plain = Decoder(self.config).to(self.device)
            plain.load_state_dict(self.state)
            stage = DecoderStage(plain.requires_grad_(False), self.config, self.device)
        training = Decoder(self.config).to(self.device)
        training.load_state_dict(self.state)
        network = stage.network
        dtype = next(network.parameters()).dtype
        assert self.text.norm is not None
        no = torch.zeros(self.shape.batch, dtype=torch.bool, device=self.device)
        condition = {
            "image_embedding": self.image,
            "text_embedding": self.text.embedding * self.text.norm[:, None],
            "text_tokens": self.text.tokens,
            "text_mask": self.text.mask,
            "drop_embedding": no,
            "drop_text": no,
        }
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in condition.items()}

        @torch.inference_mode()
        def forward() -> Tensor:
            return network(self.x.to(dtype), self.t, **cast)  # type: ignore[no-any-return]

        return ours(
            name,
            network,
            training,
            compiled,
            forward=forward,
            run=lambda net: net(self.x, self.t, **condition),
            target=self.target,
            reduced=reduced,
            sampling=lambda: stage.sample(self.image, self.seeds, text=self.text),
        )

    def diffusers(self) -> Contestant:
        network, text, null, shape = self.theirs, self.text, self.null, self.shape
        assert network is not None and text.norm is not None and null.norm is not None
        embedding = text.embedding * text.norm[:, None]
        tokens = network.projection.config.clip_extra_context_tokens
        mask = F.pad(text.mask, (tokens, 0), value=True)
        null_mask = F.pad(null.mask.expand(shape.batch, -1), (tokens, 0), value=True)

        def projected(net: nn.Module, guided: bool) -> tuple[Tensor, Tensor]:
            null_embedding = (null.embedding * null.norm[:, None]).expand(shape.batch, -1)  # type: ignore[index]
            null_tokens = null.tokens.expand(shape.batch, -1, -1)
            context, added = net.projection(  # type: ignore[operator]
                image_embeddings=self.image,
                prompt_embeds=torch.cat([null_embedding, embedding]) if guided else embedding,
                text_encoder_hidden_states=torch.cat([null_tokens, text.tokens]) if guided else text.tokens,
                do_classifier_free_guidance=guided,
            )
            return context, added

        def run(net: nn.Module) -> Tensor:
            return net(self.x, self.t, *projected(net, False), mask)  # type: ignore[no-any-return]

        betas = torch.from_numpy(DecoderStage(nn.Identity(), self.config).process.betas)

        @torch.no_grad()
        def sampled() -> Tensor:
            context, added = projected(network, True)
            both = torch.cat([null_mask, mask])

            def output_at(x: Tensor, t: Tensor) -> Tensor:
                before, after = network(torch.cat([x] * 2), t, context, added, both).chunk(2)
                mixed = before[:, :3] + shape.guidance * (after[:, :3] - before[:, :3])
                return torch.cat([mixed, after[:, 3:]], dim=1)

            kept = kept_timesteps(shape.steps)
            scheduler = peer_diffusers.unclip_scheduler(betas, kept, variance_type="learned_range")
            size = (3, shape.image, shape.image)
            return peer_diffusers.sample(scheduler, output_at, size, self.seeds, self.device).clamp(-1, 1)

        works = {
            "forward": torch.inference_mode()(lambda: run(network)),
            "training step": training_step(network, run, self.target),
            "sampling": sampled,
        }
        return Contestant("diffusers", parameters_of(network), works, tuple(works))


def their_network(shape: UNetShape) -> _Theirs:
    """Karlo's two models in another size."""
    from diffusers import UNet2DConditionModel

    try:  # diffusers moved the pipeline of this model when it deprecated it
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    except ImportError:
        from diffusers.pipelines.unclip.text_proj import UnCLIPTextProjModel

    levels = len(shape.widths)
    unet = UNet2DConditionModel(
        sample_size=shape.image,
        in_channels=3,
        out_channels=6,
        block_out_channels=shape.widths,
        layers_per_block=shape.blocks,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("SimpleCrossAttnUpBlock2D",) * (levels - 1) + ("ResnetUpsampleBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=shape.context,
        attention_head_dim=shape.head_dim,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=shape.embedding,
        time_embed_dim=4 * shape.widths[0],
        cross_attention_dim=shape.context,
    )
    return _Theirs(unet, projection)
