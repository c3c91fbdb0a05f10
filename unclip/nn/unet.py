"""The ADM U-Net (Dhariwal & Nichol 2021) with GLIDE's conditioning. It knows nothing of noise schedules.

Context tokens, where given, are concatenated to the keys and values of every self-attention layer (GLIDE, §2.1;
unCLIP §2.1).
`patch_size` folds pixels into channels before the first convolution: the network's top level then runs at 1/patch_size
of the image's resolution, which is where small models should spend their compute. `refine_channels` gives it a few
convolutions at full resolution behind the last one, over which the patches meet.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unclip.nn.blocks import AttentionBlock, BlockOptions, ContextMemory, ConvResample, ResBlock, group_norm, zeroed
from unclip.nn.config import UNetConfig
from unclip.nn.embeddings import timestep_embedding
from unclip.nn.refiner import Refiner
from unclip.nn.sparing import may_overwrite


class UNet(nn.Module):
    """(B, in_channels, H, W), t (B,) -> (B, out_channels, H, W); H and W divisible by `self.multiple`."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        levels = len(config.channel_mult)
        self.multiple = config.patch_size * 2 ** (levels - 1)
        blocks = config.num_res_blocks
        counts = (blocks,) * levels if isinstance(blocks, int) else tuple(blocks)
        if len(counts) != levels:
            raise ValueError(f"num_res_blocks names {len(counts)} levels, channel_mult {levels}")
        self.embedding_dim = 4 * config.model_channels
        widths = config.widths
        top = config.image_size // config.patch_size
        self.bottom_size, self.bottom_channels = top // 2 ** (levels - 1), widths[-1]

        options = BlockOptions(config.scale_shift_norm, config.norm_groups, config.norm_eps)

        def attention(level: int, width: int, wanted: bool | None = None) -> AttentionBlock | None:
            if not (top // 2**level in config.attention_resolutions if wanted is None else wanted):
                return None
            return AttentionBlock(width, config.head_channels, context_dim, options)

        def block(width: int, out: int) -> ResBlock:
            return ResBlock(width, out, self.embedding_dim, config.dropout, None, options)

        def resampler(width: int, direction: str) -> ResBlock | ConvResample:
            if not config.resblock_updown:
                return ConvResample(width, direction)
            return ResBlock(width, width, self.embedding_dim, config.dropout, direction, options)

        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, self.embedding_dim),
            nn.SiLU(),
            nn.Linear(self.embedding_dim, self.embedding_dim),
        )
        self.conv_in = nn.Conv2d(in_channels * config.patch_size**2, widths[0], 3, padding=1)
        skips = [widths[0]]
        width = widths[0]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            for _ in range(counts[level]):
                self.down.append(_Stage(block(width, out), attention(level, out)))
                width = out
                skips.append(width)
            if level < levels - 1:
                self.down.append(_Stage(resampler(width, "down"), None))
                skips.append(width)
        middle = attention(levels - 1, width, config.middle_attention)
        self.middle = _Middle(block(width, width), middle, block(width, width))
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            out = widths[level]
            for index in range(counts[level] + 1):
                resample = resampler(out, "up") if level > 0 and index == counts[level] else None
                self.up.append(_Stage(block(width + skips.pop(), out), attention(level, out), resample))
                width = out
        self.norm_out = group_norm(width, config.norm_groups, config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(width, out_channels * config.patch_size**2, 3, padding=1))
        if config.refine_channels:
            self.refiner = Refiner(in_channels, out_channels, config.refine_channels, self.embedding_dim)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        embedding: Tensor | None = None,
        context: Tensor | ContextMemory | None = None,
        context_mask: Tensor | None = None,
        bottom: Tensor | None = None,
    ) -> Tensor:
        """`embedding` (B, 4·model_channels) is added to the timestep's; `context` (B, N, D), mask (B, N) True = seen;
        `bottom` (B, bottom_channels, h, w) is added to the lowest feature map before the middle block.
        """
        dtype = self.conv_in.weight.dtype  # half precision only where the parameters are (DecoderStage.load)
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        if embedding is not None:
            emb = emb + embedding
        h = self.conv_in(F.pixel_unshuffle(x.to(dtype), self.config.patch_size))
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, None, emb, context, context_mask)
            skips.append(h)
        if bottom is not None:
            h = h + bottom
        h = self._run(self.middle, h, None, emb, context, context_mask)
        for stage in self.up:
            h = self._run(stage, h, skips.pop(), emb, context, context_mask)
        h = self.conv_out(F.silu(self.norm_out(h), inplace=may_overwrite(h)))
        h = F.pixel_shuffle(h, self.config.patch_size)
        return (self.refiner(h, x.to(dtype), emb) if self.config.refine_channels else h).float()

    def _run(self, module: nn.Module, *inputs: Tensor | ContextMemory | None) -> Tensor:
        if self.config.checkpoint_activations and self.training:
            result: Tensor = checkpoint(module, *inputs, use_reentrant=False)
            return result
        return module(*inputs)  # type: ignore[no-any-return]


class _Stage(nn.Module):
    """A residual block, then attention, then a resampling block, the last two where given."""

    def __init__(
        self,
        res: ResBlock | ConvResample,
        attention: AttentionBlock | None,
        resample: ResBlock | ConvResample | None = None,
    ) -> None:
        super().__init__()
        self.res, self.attention, self.resample = res, attention, resample

    def forward(
        self,
        h: Tensor,
        skip: Tensor | None,
        emb: Tensor,
        context: Tensor | ContextMemory | None,
        mask: Tensor | None,
    ) -> Tensor:
        h = self.res(h, emb, skip)
        if self.attention is not None:
            h = self.attention(h, context, mask)
        if self.resample is not None:
            h = self.resample(h, emb)
        return h


class _Middle(nn.Module):
    def __init__(self, first: ResBlock, attention: AttentionBlock | None, last: ResBlock) -> None:
        super().__init__()
        self.first, self.attention, self.last = first, attention, last

    def forward(
        self,
        h: Tensor,
        skip: Tensor | None,
        emb: Tensor,
        context: Tensor | ContextMemory | None,
        mask: Tensor | None,
    ) -> Tensor:
        h = self.first(h, emb)
        if self.attention is not None:
            h = self.attention(h, context, mask)
        return self.last(h, emb)  # type: ignore[no-any-return]
