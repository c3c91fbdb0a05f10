"""The first upsampler beside diffusers' UNet2DModel (same weights) and dalle2-pytorch's super-resolution Unet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peer_dalle2, peer_diffusers
from benchmarks.contest import Contestant, parameters_of, training_step
from benchmarks.lineup import lineup, loaded, ours
from benchmarks.shapes import UNetShape, kept_timesteps, rand, timesteps
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.interop.super_resolution import upsampler_from_diffusers
from upsamplers import Upsampler, UpsamplerConfig, UpsamplerStage
from upsamplers.sampling import KIND


def contestants(shape: UNetShape, device: torch.device, compiled: bool = False) -> list[Contestant]:
    """Ours in eager float32 and with its defaults, then the peers that are installed."""
    return lineup(
        _Bench(shape, device), device, compiled, lambda parameters: peer_dalle2.upsampler(shape, parameters, device)
    )


class _Bench:
    """One set of weights and inputs for all of them. Training takes crops of a quarter, as the recipe does."""

    def __init__(self, shape: UNetShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.seeds = list(range(shape.batch))
        self.low = rand(shape.batch, 3, shape.image // 4, shape.image // 4, seed=6).clamp(-1, 1).to(device)
        self.x = rand(shape.batch, 3, shape.image, shape.image, seed=7).to(device)
        self.target = rand(shape.batch, 3, shape.image, shape.image, seed=8).to(device)
        self.t = timesteps(shape.batch).to(device)
        self.theirs = None
        torch.manual_seed(0)
        if peer_diffusers.INSTALLED:
            from diffusers import UNet2DModel

            levels = len(shape.widths)
            self.theirs = UNet2DModel(
                sample_size=shape.image,
                in_channels=6,
                out_channels=3,
                block_out_channels=shape.widths,
                layers_per_block=shape.blocks,
                down_block_types=("ResnetDownsampleBlock2D",) * levels,
                up_block_types=("ResnetUpsampleBlock2D",) * levels,
                add_attention=False,
            ).eval()
            model = (self.theirs.state_dict(), dict(self.theirs.config))
            self.config, self.state = upsampler_from_diffusers(model, steps=kept_timesteps(shape.steps))
            self.theirs = self.theirs.to(device)
        else:
            mults = [width / shape.widths[0] for width in shape.widths]
            unet = {
                "image_size": shape.image,
                "model_channels": shape.widths[0],
                "channel_mult": [int(mult) if mult == int(mult) else mult for mult in mults],
                "num_res_blocks": shape.blocks,
                "scale_shift_norm": False,
            }
            edges = {"low_size": shape.image // 4, "high_size": shape.image}
            how = {"steps": kept_timesteps(shape.steps), "sampler": "ddpm", "eta": 1.0, "corruption": {"kind": "none"}}
            self.config = parse_config(UpsamplerConfig, {"unet": unet, **edges, **how})
            self.state = Upsampler(self.config).state_dict()

    def ours(self, name: str, reduced: bool, compiled: bool) -> Contestant:
        """`reduced`: bfloat16 autocast, as `UpsamplerStage.load` gives it on a device that has it."""
        if name.endswith("defaults"):
            stage = loaded(UpsamplerStage, KIND, self.config, self.state, self.device, reduced)
        else:
            plain = Upsampler(self.config)
            plain.load_state_dict(self.state)
            stage = UpsamplerStage(plain, self.device)
        training = Upsampler(self.config).to(self.device)
        training.load_state_dict(self.state)
        network = stage.network.requires_grad_(False)

        @torch.inference_mode()
        def forward() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=stage.dtype != torch.float32):
                return network(self.x, self.t, self.low)  # type: ignore[no-any-return]

        return ours(
            name,
            network,
            training,
            compiled,
            forward=forward,
            run=lambda net: net(self.x, self.t, self.low),
            target=self.target,
            reduced=reduced,
            sampling=lambda: stage.sample(self.low, self.seeds),
        )

    def diffusers(self) -> Contestant:
        network, shape = self.theirs, self.shape
        assert network is not None

        def enlarged() -> Tensor:
            size = (shape.image, shape.image)
            return F.interpolate(self.low, size, mode="bicubic", antialias=True)

        def run(net: nn.Module) -> Tensor:
            return net(torch.cat([self.x, enlarged()], dim=1), self.t).sample  # type: ignore[no-any-return]

        betas = torch.from_numpy(GaussianDiffusion(self.config.diffusion).betas)

        def sampled() -> Tensor:
            low = enlarged()
            kept = kept_timesteps(shape.steps)
            scheduler = peer_diffusers.unclip_scheduler(betas, kept, variance_type="fixed_small_log")
            x = peer_diffusers.sample(
                scheduler,
                lambda x, t: network(torch.cat([x, low], dim=1), t).sample,
                (3, shape.image, shape.image),
                self.seeds,
                self.device,
            )
            return x.clamp(-1, 1)

        works = {
            "forward": torch.inference_mode()(lambda: run(network)),
            "training step": training_step(network, run, self.target),
            "sampling": sampled,
        }
        return Contestant("diffusers", parameters_of(network), works, tuple(works))
