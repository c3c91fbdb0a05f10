"""Low-rank adapters: what they change and what not, merged and apart, in models and on the command line."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_decoder
import helpers_prior
import pytest
import torch
from helpers_adapters import make_adapters, shake, tuned
from helpers_bundle import WIDTHS
from torch import Tensor, nn

from decoder import Decoder, decoder_loss
from prior import Prior
from prior.objective import prior_loss
from unclip.adapters import (
    add_adapter,
    merge_adapter,
    merged_state,
    parse_adapter,
    read_adapter,
    shell_of,
    target_layers,
)
from unclip.bundle import load_weights, save_part
from unclip.config import LoRAConfig
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError
from unclip.pipeline import UnCLIP

GLIDE = {"kind": "glide", "vocab_size": 9, "length": 5, "width": 16, "depth": 2, "heads": 2}


def decoder_answer(network: nn.Module) -> Tensor:
    features, no = helpers_decoder.text(2), torch.zeros(2, dtype=torch.bool)
    size = helpers_decoder.SIZE
    answer: Tensor = network(
        helpers_decoder.rand(2, 3, size, size, seed=3), torch.tensor([50, 700]),
        image_embedding=helpers_decoder.unit(2, 7), text_tokens=features.tokens, text_mask=features.mask,
        drop_embedding=no, drop_text=no,
    )  # fmt: skip
    return answer


# ---- which layers --------------------------------------------------------------------------------------------


def test_targets_are_found_by_kind_and_by_pattern() -> None:
    decoder = Decoder(helpers_decoder.config(text=GLIDE))
    found = target_layers(decoder, ["attention"])
    own = {name.rpartition(".")[2] for name in found if name.startswith("unet.")}
    assert own == {"qkv", "context_kv", "out"}
    text = {name.rpartition(".")[2] for name in found if name.startswith("text_transformer.")}
    assert text == {"to_q", "to_k", "to_v", "to_out"}  # x-transformers' own
    feedforward = target_layers(decoder, ["feedforward"])
    assert len(feedforward) == 2 * GLIDE["depth"]  # type: ignore[operator]
    convolutions = [n for n, m in decoder.named_modules() if isinstance(m, nn.Conv2d)]
    assert target_layers(decoder, ["conv"]) == sorted(convolutions)
    every = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear)]
    assert target_layers(decoder, ["linear"]) == sorted(every)
    assert target_layers(decoder, ["unet.middle", "*.to_q"]) == sorted(
        n for n in [*every, *convolutions] if n.startswith("unet.middle.") or n.endswith(".to_q")
    )
    prior = Prior(helpers_prior.config())
    assert len(target_layers(prior, ["attention"])) == 4 * helpers_prior.SMALL["depth"]


def test_a_target_whose_name_ends_others_takes_itself_alone() -> None:
    """peft takes names by their end: "out" would be "inner.out" too."""
    network = nn.ModuleDict({"out": nn.Linear(4, 4), "inner": nn.ModuleDict({"out": nn.Linear(4, 4)})})
    add_adapter(network, LoRAConfig(target=("out",)))
    assert [name for name, p in network.named_parameters() if p.requires_grad] == [
        "out.lora_A.default.weight", "out.lora_B.default.weight",
    ]  # fmt: skip


def test_what_is_frozen_gets_no_adapter() -> None:
    network = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4).requires_grad_(False)})
    add_adapter(network, LoRAConfig(target=("linear",)))
    assert not [name for name, _ in network.named_parameters() if name.startswith("last.lora")]
    with pytest.raises(UsageError, match="finds only layers that this run freezes"):
        add_adapter(nn.ModuleDict({"a": nn.Linear(4, 4).requires_grad_(False)}), LoRAConfig(target=("a",)))


# ---- learning ------------------------------------------------------------------------------------------------


def test_a_subject_is_learned_by_the_adapters_alone(tmp_path: Path) -> None:
    """A decoder that knows two pictures meets a third: the loss on it halves, and no other weight moves by a bit."""
    own = helpers_decoder.config(diffusion={"prediction": "x_start"}, drop_embedding=0.0, drop_text=0.0)
    embedding, features = helpers_decoder.unit(2, 7), helpers_decoder.text(2)
    stage, _ = helpers_decoder.overfit(own, embedding, features, steps=60)
    network, process = stage.network.train().requires_grad_(True), GaussianDiffusion(own.diffusion)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    subject = 0.8 * torch.ones(8, 3, 8, 8)
    subject[:, 1] = -0.6
    named, caption = helpers_decoder.unit(1, 30).expand(8, -1), helpers_decoder.text(1, seed=31)
    caption = caption[torch.zeros(8, dtype=torch.long)]

    def loss(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return decoder_loss(network, process, own, subject, named, caption, generator)["mse"].mean()

    tuning = tuned(network, "decoder", tmp_path, rank=4, target=["attention", "conv"])
    first = sum(loss(seed).item() for seed in range(900, 904))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    last = sum(loss(seed).item() for seed in range(900, 904))
    assert last < first / 2, (first, last)
    after = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    states: list[dict[str, Tensor]] = []
    tuning.exporting(lambda state, _folder: states.append(state))(network.state_dict(), tmp_path / "model")
    assert set(states[0]) == set(before)  # the plain network's, and
    changed = {name for name, value in states[0].items() if not torch.equal(value, before[name])}
    targets = set(target_layers(Decoder(own), ["attention", "conv"]))
    assert changed and {name.removesuffix(".weight") for name in changed} <= targets


def test_the_prior_learns_through_its_adapters(tmp_path: Path) -> None:
    network = helpers_prior.network(drop_text=0.0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    process, text = GaussianDiffusion(network.config.diffusion), helpers_prior.text(4)
    target = torch.nn.functional.normalize(helpers_prior.rand(4, helpers_prior.DIM, seed=9), dim=1)
    tuned(network, "prior", tmp_path, rank=4, target=["linear"])
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        loss = prior_loss(network, network, process, network.config, target, text, generator)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < sum(history[:5]) / 2
    after = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---- merged and apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["attention", "conv", "linear"])
def test_merged_and_unmerged_agree(target: str, tmp_path: Path) -> None:
    plain = helpers_decoder.network()
    network = copy.deepcopy(plain).requires_grad_(True)
    fresh = decoder_answer(network).detach()
    tuning = tuned(network, "decoder", tmp_path, target=[target], alpha=6.0)
    network.eval()
    assert torch.equal(decoder_answer(network), fresh)  # B is zero
    shake(network)
    with torch.no_grad():
        unmerged = decoder_answer(network)
    assert float((unmerged - fresh).abs().max()) > 0.01
    states: list[dict[str, Tensor]] = []
    tuning.exporting(lambda state, _folder: states.append(state))(
        {name: value.clone() for name, value in network.state_dict().items()}, tmp_path / "model"
    )
    merged = copy.deepcopy(plain)
    merged.load_state_dict(states[0])
    assert torch.allclose(decoder_answer(merged), unmerged, atol=1e-5)
    # The folder apart gives the same weights, half of it half the change, and none of it none.
    adapter = read_adapter(tmp_path / "adapter")
    apart, half, none = (copy.deepcopy(plain) for _ in range(3))
    merge_adapter(apart, apart.config, adapter)
    assert all(torch.equal(value, states[0][name]) for name, value in apart.state_dict().items())
    merge_adapter(half, half.config, adapter, 0.5)
    for name, value in half.state_dict().items():
        between = torch.lerp(plain.state_dict()[name].float(), states[0][name].float(), 0.5)
        assert torch.allclose(value.float(), between, atol=1e-6), name
    merge_adapter(none, none.config, adapter, 0.0)
    assert torch.equal(decoder_answer(none), fresh)
    assert all(not p.requires_grad for p in apart.parameters()) and set(apart.state_dict()) == set(plain.state_dict())


def test_peft_reads_the_folder_too(tmp_path: Path) -> None:
    from peft import PeftModel

    plain = helpers_prior.network()
    network = copy.deepcopy(plain)
    tuning = tuned(network, "prior", tmp_path, target=["attention", "feedforward"])
    shake(network)
    given = helpers_prior.inputs()
    expected = network.eval()(**given)
    tuning.exporting(lambda _state, _folder: None)(network.state_dict(), tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json",
    ]  # fmt: skip
    del plain.config  # peft would take it for one of Hugging Face's
    wrapped = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert torch.equal(wrapped.eval()(**given), expected)


def test_a_copy_without_weights_takes_no_memory() -> None:
    network = helpers_prior.network()
    add_adapter(network, LoRAConfig(rank=2))
    shell = shell_of(network)
    assert all(tensor.is_meta for tensor in (*shell.parameters(), *shell.buffers()))
    assert not any(parameter.is_meta for parameter in network.parameters())
    shake(network)
    given = helpers_prior.inputs()
    expected = network.eval()(**given)
    plain = helpers_prior.network()
    plain.load_state_dict(merged_state(shell, network.state_dict()))
    assert torch.allclose(plain(**given), expected, atol=1e-5)


def test_every_process_draws_the_same_adapters() -> None:
    first, second = helpers_prior.network(), helpers_prior.network()
    torch.manual_seed(1)
    add_adapter(first, LoRAConfig(), seed=7)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # nothing drawn from the global state
    torch.manual_seed(2)
    add_adapter(second, LoRAConfig(), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- models and the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(tiny_bundle, tmp_path_factory.mktemp("runs"))


def test_a_model_takes_adapters_of_all_parts(tiny_bundle: Path, subject: dict[str, Path]) -> None:
    plain = UnCLIP.from_pretrained(tiny_bundle)
    model = UnCLIP.from_pretrained(tiny_bundle, adapters=[subject["prior"], f"{subject['decoder']}:0.5"])
    assert not torch.allclose(model.predict_embedding("pizza"), plain.predict_embedding("pizza"), atol=1e-3)
    own = {name: value.clone() for name, value in plain.decoder.network.state_dict().items()}
    merge_adapter(plain.decoder.network, plain.decoder.config, read_adapter(subject["decoder"]), 0.5)
    for name, value in model.decoder.network.state_dict().items():
        assert torch.equal(value, plain.decoder.network.state_dict()[name])
    assert any(not torch.equal(value, own[name]) for name, value in model.decoder.network.state_dict().items())
    up = UnCLIP.from_pretrained(tiny_bundle, adapters=[(subject["upsampler_1024"], 1.0)])
    before, after = (m.upsamplers for m in (plain, up))
    assert torch.equal(before[0].network.unet.conv_in.weight, after[0].network.unet.conv_in.weight)
    assert not torch.equal(before[1].network.unet.conv_in.weight, after[1].network.unet.conv_in.weight)
    # Left out with the upsampler that it is for.
    assert UnCLIP.from_pretrained(tiny_bundle, size=256, adapters=[subject["upsampler_1024"]]).sizes == (64, 256)


def test_sample_and_merge(
    tiny_bundle: Path, subject: dict[str, Path], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The merged model draws what the model with adapters draws, and the file tells of them."""
    from PIL import Image

    common = ["--prompt", "pizza", "--size", "64", "--quiet"]
    adapters = [f"{subject['decoder']}:0.7", str(subject["prior"])]
    code, _, error = run_cli("merge", tiny_bundle, *adapters, "--out", tmp_path / "merged", "--dtype", "float32")
    assert code == 0, error
    drawn = {}
    for name, options in (
        ("plain", ["--model", tiny_bundle]),
        ("apart", ["--model", tiny_bundle, "--adapter", adapters[0], "--adapter", adapters[1]]),
        ("merged", ["--model", tmp_path / "merged"]),
    ):
        code, _, error = run_cli("sample", *common, *options, "--out", tmp_path / f"{name}.png")
        assert code == 0, error
        drawn[name] = Image.open(tmp_path / f"{name}.png")
    assert drawn["apart"].tobytes() == drawn["merged"].tobytes() != drawn["plain"].tobytes()
    assert drawn["apart"].info["adapters"] == "decoder/adapter:0.7, prior/adapter"
    manifest = json.loads((tmp_path / "merged" / "unclip.json").read_text())
    assert manifest["name"] == "merged" and manifest["example_prompts"] == ["pizza", "red apple", "rainbow"]
    kept = [load_weights(folder / "upsampler_256") for folder in (tiny_bundle, tmp_path / "merged")]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    code, _, error = run_cli("merge", tiny_bundle, *adapters, "--out", tmp_path / "merged")
    assert code == 1 and "exists; pass --overwrite to replace it" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": True}, r"no adapter folder at .*; a run with train\.lora writes one"),
        ({"drop": "adapter_config.json"}, r"is no adapter: adapter_config.json is missing \(found: adapter_model"),
        ({"config.json": {"part": "text"}}, r"is for a text, and this model has none"),
        ({"config.json": {"model": {"inpainting": True}}}, r"another decoder: inpainting is True there and False here"),
        ({"config.json": {"model": {"diffusion": {"prediction": "v"}}}}, r"it predicts v there and epsilon here"),
        ({"adapter_config.json": {"peft_type": "IA3"}}, r"is a 'IA3' of peft; only LORA is read here"),
        ({"weights": "shape"}, r"belongs to another decoder: unet\..* is \(.*\) there and \(.*\) here"),
        ({"weights": "name"}, r"belongs to another decoder: there is no layer elsewhere here"),
        ({"weights": "damage"}, r"adapter_model.safetensors is damaged or not a safetensors file"),
        ({"weight": "x"}, r"the adapter '.*:x' is neither a folder nor FOLDER:WEIGHT"),
        ({"weight": "nan"}, r"the weight of the adapter .* is nan, expected a number"),
    ],
)
def test_adapters_that_are_refused(
    change: dict[str, Any], message: str, tiny_bundle: Path, subject: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    if "missing" not in change:
        shutil.copytree(subject["decoder"], folder)
    if "drop" in change:
        (folder / change["drop"]).unlink()
    for name in ("config.json", "adapter_config.json"):
        if name in change:
            body = json.loads((folder / name).read_text())
            inside = body["config"] if name == "config.json" else body
            for key, value in change[name].items():
                inside[key] = {**inside[key], **value} if isinstance(value, dict) else value
            (folder / name).write_text(json.dumps(body))
    file = folder / "adapter_model.safetensors"
    if change.get("weights") == "damage":
        file.write_bytes(b"\0" * 40)
    elif "weights" in change:
        state = load_file(file)
        first = sorted(state)[0].rpartition(".lora_")[0]
        for name in [name for name in state if name.startswith(first + ".")]:
            value = state.pop(name)
            changed = name.replace(first, "base_model.model.elsewhere") if change["weights"] == "name" else name
            state[changed] = torch.cat([value, value]) if "lora_B" in name else value
        save_file(state, file)
    weight = f":{change['weight']}" if "weight" in change else ""
    with pytest.raises(UnclipError, match=message) as caught:
        UnCLIP.from_pretrained(tiny_bundle, size=64, adapters=[f"{folder}{weight}"])
    assert "\n" not in str(caught.value)


def test_what_names_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert parse_adapter("runs/a") == (Path("runs/a"), 1.0)
    assert parse_adapter("runs/a:-0.5") == (Path("runs/a"), -0.5)
    assert parse_adapter((tmp_path, 2)) == (tmp_path, 2.0)
    assert parse_adapter(str(tmp_path / "a:0.5")) == (tmp_path / "a:0.5", 1.0)  # a folder of that very name


def test_without_peft_the_extra_is_named(
    tiny_bundle: Path, subject: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnclipError, match=r"need the package peft; install it with: pip install 'unclip\[lora\]'"):
        UnCLIP.from_pretrained(tiny_bundle, size=64, adapters=[subject["decoder"]])
    with pytest.raises(UnclipError, match=r"unclip\[lora\]"):
        add_adapter(helpers_prior.network(), LoRAConfig())


def test_an_adapter_of_a_wider_decoder_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    wider = Decoder(helpers_decoder.config(**WIDTHS))
    save_part(tmp_path / "part", "decoder", wider.config, wider.state_dict())
    tuning = tuned(wider, "decoder", tmp_path)
    tuning.exporting(lambda _state, _folder: None)(wider.state_dict(), tmp_path / "model")
    with pytest.raises(UnclipError, match=r"belongs to another decoder: .* and [0-9]+ more"):
        UnCLIP.from_pretrained(tiny_bundle, size=64, adapters=[tmp_path / "adapter"])
