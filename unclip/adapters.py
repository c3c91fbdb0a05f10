"""Low-rank adapters (LoRA, Hu et al. 2022) of a stage's network, by `peft`: made, written, read, merged.

An adapter is a folder in peft's own layout, `adapter_config.json` and `adapter_model.safetensors`, which
`peft.PeftModel.from_pretrained` reads as well, beside a `config.json` that says which part it is for.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.bundle import FORMAT, read_json, replacing, write_json
from unclip.config import LoRAConfig
from unclip.errors import UnclipError, UsageError, contents, nearest

KIND = "adapter"
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's name for the only adapter of a model
_PREFIX = "base_model.model."  # what peft puts before the names of a model that it wraps
_SAME = ("kind", "inpainting", "residual", "low_size", "high_size", "embedding_length")


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder holds it: the kind of part it is for, that part's configuration, and its tensors."""

    folder: Path
    part: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]  # peft's LoraConfig
    state: Mapping[str, Tensor]  # "<module>.lora_A.weight" (r, …) and "<module>.lora_B.weight" (…, r)

    @property
    def modules(self) -> list[str]:
        """Names of the layers that it changes."""
        return sorted({name.rpartition(".lora_")[0] for name in self.state})


# ---- making one --------------------------------------------------------------------------------------------


def target_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers and 2D convolutions that `targets` (`LoRAConfig.target`) mean.

    Raises UsageError: a target that means none.
    """
    kinds = {kind: sorted(set(_layers_of(network, kind))) for kind in ("attention", "feedforward", "conv", "linear")}
    every = sorted({*kinds["linear"], *kinds["conv"]})
    chosen: set[str] = set()
    for target in targets:
        found = kinds.get(target) or [name for name in every if below(name, target)]
        if target in kinds and not kinds[target]:
            there = ", ".join(f"{kind} ({len(names)})" for kind, names in kinds.items() if names) or "none"
            raise UsageError(f"train.lora.target {target!r} finds no layer in this network; it has {there}")
        if not found:
            raise UsageError(
                f"train.lora.target {target!r} matches no linear layer or convolution of this network; "
                f"{nearest(target, every)}"
            )
        chosen.update(found)
    return sorted(chosen)


def below(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a shell pattern, or stands below one that does."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _layers_of(network: nn.Module, kind: str) -> Iterator[str]:
    from unclip.nn.blocks import AttentionBlock
    from unclip.nn.transformers import Attention, FeedForward

    known: dict[str, tuple[type[nn.Module], ...]] = {
        "attention": (AttentionBlock, Attention),
        "feedforward": (FeedForward,),
    }
    owners = known.get(kind, (nn.Module,))
    wanted = nn.Conv2d if kind == "conv" else nn.Linear
    for owner, module in network.named_modules():
        if isinstance(module, owners):
            for name, layer in module.named_modules():
                if isinstance(layer, wanted):
                    yield ".".join(filter(None, (owner, name)))


def add_adapter(network: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Give `network` fresh adapters in place and freeze everything else. It computes what it did before, as B is zero.
    Layers that are frozen already get none.

    Every process draws the same A from `seed`; the global random state is left as it was.
    Raises UsageError: a target that means no layer. UnclipError: peft is not installed.
    """
    peft = _peft()
    layers = [name for name in target_layers(network, config.target) if _learns(network, name)]
    if not layers:
        raise UsageError(f"train.lora.target {', '.join(config.target)} finds only layers that this run freezes")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=_exactly(network, layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, network, adapter_name=_NAME)


def _exactly(network: nn.Module, layers: Sequence[str]) -> list[str] | str:
    """`layers` as peft's target_modules. It takes names that end alike for targets too; then a pattern says it."""
    others = [name for name, _ in network.named_modules() if name not in set(layers)]
    if any(name.endswith(f".{layer}") for name in others for layer in layers):
        return "|".join(re.escape(layer) for layer in layers)
    return list(layers)


def _learns(network: nn.Module, layer: str) -> bool:
    return any(parameter.requires_grad for parameter in network.get_submodule(layer).parameters())


def shell_of(network: nn.Module) -> nn.Module:
    """A copy of the network without memory for its weights, for `merged_state`."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


def merged_state(shell: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network with adapters -> that of the plain network, adapters merged into the weights.

    `shell` is the network's `shell_of`, and is used up; tensors of `state` are changed in place.
    """
    shell.load_state_dict(dict(state), assign=True)
    _merge(shell, 1.0)
    return shell.state_dict()


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' tensors in the state dict of a network with adapters, under the names of `Adapter.state`."""
    ending = f".{_NAME}.weight"
    return {name.replace(ending, ".weight"): value for name, value in state.items() if name.endswith(ending)}


def save_adapter(folder: Path, part: str, model: Any, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write an adapter's folder as a whole. `part` is the kind of part, `model` its configuration, `network` one that
    has the adapters, `state` their tensors (`adapter_state`).
    """
    from safetensors.torch import save_file

    settings = network.peft_config[_NAME].to_dict()  # type: ignore[index, union-attr]
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    body = {"part": part, "model": model.model_dump(mode="json")}
    with replacing(folder) as temporary:
        write_json(temporary / SETTINGS, {**settings, "inference_mode": True})
        tensors = {f"{_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)
        write_json(temporary / "config.json", {"format": FORMAT, "kind": KIND, "config": body})


# ---- using one ---------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """Read what `save_adapter` wrote. Raises UnclipError: no such folder, no adapter, damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise UnclipError(f"no adapter folder at {folder}; a run with train.lora writes one, RUN/adapter")
    missing = [name for name in ("config.json", SETTINGS, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UnclipError(f"{folder} is no adapter: {missing[0]} is missing (found: {contents(folder)})")
    body, settings = read_json(folder / "config.json"), read_json(folder / SETTINGS)
    config = body.get("config")
    if body.get("kind") != KIND or not isinstance(config, dict) or not {"part", "model"} <= config.keys():
        raise UnclipError(f"{folder} holds a {body.get('kind')!r}, expected an {KIND!r}")
    if body.get("format") != FORMAT:
        raise UnclipError(f"{folder} has format {body.get('format')!r}, this version reads format {FORMAT}")
    if settings.get("peft_type") != "LORA":
        raise UnclipError(f"{folder} is a {settings.get('peft_type')!r} of peft; only LORA is read here")
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UnclipError(f"{folder / WEIGHTS} is damaged or not a safetensors file: {error}") from error
    plain = {name.removeprefix(_PREFIX): value.float() for name, value in state.items()}
    return Adapter(folder, config["part"], config["model"], settings, plain)


def parse_adapter(text: str | Path | tuple[str | Path, float]) -> tuple[Path, float]:
    """'FOLDER', 'FOLDER:0.5' or (folder, 0.5) -> the folder and its weight, 1 by default.

    Raises UsageError: a weight that is no finite number.
    """
    if isinstance(text, tuple):
        folder, weight = Path(text[0]), text[1]
    else:
        folder, weight = Path(text), 1.0
        before, colon, after = str(text).rpartition(":")
        if colon and before and not folder.exists():
            try:
                folder, weight = Path(before), float(after)
            except ValueError:
                raise UsageError(f"the adapter {str(text)!r} is neither a folder nor FOLDER:WEIGHT") from None
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise UsageError(f"the weight of the adapter {folder} is {weight!r}, expected a number such as 0.8")
    return folder.expanduser(), float(weight)


def sizes_fit(adapter: Adapter, config: Any) -> bool:
    """Whether a part of this configuration is of the sizes that the adapter names (for a choice of upsamplers)."""
    body = config.model_dump(mode="json")
    return all(adapter.model.get(key) == body.get(key) for key in ("low_size", "high_size"))


def merge_adapter(network: nn.Module, config: Any, adapter: Adapter, weight: float = 1.0) -> None:
    """W ← W + weight · alpha/rank · B·A in every layer of the adapter, in place; the network is a plain one again.

    Raises UnclipError: the adapter is for a network of another architecture, or peft is not installed.
    """
    _check(network, config, adapter)
    peft = _peft()
    known = {name: adapter.settings.get(name) for name in ("r", "lora_alpha", "use_rslora", "rank_pattern")}
    known["alpha_pattern"] = adapter.settings.get("alpha_pattern")
    settings = peft.LoraConfig(
        target_modules=_exactly(network, adapter.modules),
        **{name: value for name, value in known.items() if value is not None},
    )
    frozen = {name: p.requires_grad for name, p in network.named_parameters()}
    peft.inject_adapter_in_model(settings, network, adapter_name=_NAME)
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in adapter.state.items():
            own[f"{name.removesuffix('.weight')}.{_NAME}.weight"].copy_(value)
    _merge(network, weight)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(frozen[name])


def apply_adapters(
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    stages: Mapping[str, Sequence[Any]],
    all_there: bool = True,
) -> None:
    """Merge low-rank adapters into the networks of loaded stages, by the kind of part they are for.

    Of several upsamplers an adapter takes the one of its sizes. Without `all_there` some upsamplers were left out on
    purpose, and so are their adapters. Raises UnclipError: no adapter, or one for another network.
    """
    for given in adapters:
        folder, weight = parse_adapter(given)
        adapter = read_adapter(folder)
        there = stages.get(adapter.part, ())
        fitting = [stage for stage in there if sizes_fit(adapter, stage.config)]
        if not fitting and adapter.part == "upsampler" and not all_there:
            continue
        if not there:
            why = "this model has none" if len(stages) > 1 else f"only {next(iter(stages))}s run here; leave it out"
            raise UnclipError(f"the adapter {folder} is for a {adapter.part}, and {why}")
        stage = (fitting or there)[0]
        merge_adapter(stage.network, stage.config, adapter, weight)


def _merge(network: nn.Module, weight: float) -> None:
    """Merge peft's layers and put the plain ones back in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        adapted: Any = layer
        adapted.set_scale(_NAME, weight)
        adapted.merge()
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, adapted.get_base_layer())
    del network.peft_config


def _check(network: nn.Module, config: Any, adapter: Adapter) -> None:
    """Refuse an adapter of another architecture in one sentence."""
    body = config.model_dump(mode="json")
    differing = [
        f"{key} is {adapter.model[key]!r} there and {body[key]!r} here"
        for key in _SAME
        if key in body and key in adapter.model and adapter.model[key] != body[key]
    ]
    there, here = (part.get("diffusion") or {} for part in (adapter.model, body))
    if there.get("prediction") != here.get("prediction"):
        differing.append(f"it predicts {there.get('prediction')} there and {here.get('prediction')} here")
    layers = dict(network.named_modules())
    for name in adapter.modules:
        differing += _layer_differs(name, layers.get(name), adapter.state)
    if differing:
        more = f" and {len(differing) - 2} more" if len(differing) > 2 else ""
        raise UnclipError(
            f"the adapter {adapter.folder} belongs to another {adapter.part}: {'; '.join(differing[:2])}{more}"
        )


def _layer_differs(name: str, layer: nn.Module | None, state: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return [f"there is no layer {name} here"]
    down, up = state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight")
    if down is None or up is None:
        return [f"{name} lacks one of its two matrices"]
    wanted, given = tuple(layer.weight.shape), (up.shape[0], *down.shape[1:])
    return [] if wanted == given else [f"{name} is {given} there and {wanted} here"]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UnclipError(
            "low-rank adapters need the package peft; install it with: pip install 'unclip[lora]'"
        ) from error
    return peft
