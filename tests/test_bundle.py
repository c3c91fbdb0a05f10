"""Model folders: round trips, shards, replacement as a whole, and what is said of damaged ones."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unclip import bundle
from unclip.config import DiffusionConfig
from unclip.errors import UnclipError, UsageError

CONFIG = DiffusionConfig(timesteps=77, prediction="v")


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(20, 30, generator=generator) for i in range(6)}


def saved(folder: Path, **extra: Any) -> Path:
    bundle.save_part(folder, "prior", CONFIG, weights(), extra or None)
    return folder


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads(file.read_text())
    edit(body)
    file.write_text(json.dumps(body))


# ---- parts -------------------------------------------------------------------------------------------------


def test_part_round_trip(tmp_path: Path) -> None:
    folder = saved(tmp_path / "deep" / "part", steps=40)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    config, state = bundle.load_part(folder, "prior", DiffusionConfig)
    assert config == CONFIG and set(state) == set(weights())
    assert all(torch.equal(state[name], tensor) for name, tensor in weights().items())
    body = bundle.read_part_json(folder, "prior")
    assert (body["format"], body["kind"], body["steps"]) == (1, "prior", 40)


def test_weights_come_back_in_float32_and_other_types_as_they_were(tmp_path: Path) -> None:
    state = {
        "half": torch.tensor([0.5, -2.0]).half(),
        "brain": torch.tensor([0.5, -2.0]).bfloat16(),
        "count": torch.tensor([3, 4]),
        "turned": torch.arange(6.0).view(2, 3).T,  # not contiguous
        "image": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(7.0),
        "learns": nn.Parameter(torch.ones(2)),
    }
    bundle.save_weights(tmp_path, state)
    loaded = bundle.load_weights(tmp_path)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: torch.int64 if name == "count" else torch.float32 for name in state
    }
    assert all(torch.equal(loaded[name], state[name].to(loaded[name].dtype)) for name in state)


def test_large_weights_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_SHARD_BYTES", 2 * 20 * 30 * 4)
    folder = saved(tmp_path / "part")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((folder / name).stat().st_size < 2 * 20 * 30 * 4 + 1000 for name in shards)
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 for name in shards)
    _, state = bundle.load_part(folder, "prior", DiffusionConfig)
    assert set(state) == set(weights())
    assert all(torch.equal(state[name], tensor) for name, tensor in weights().items())
    (folder / shards[1]).unlink()
    with pytest.raises(UnclipError, match=rf"has no weights: {shards[1]} is missing"):
        bundle.load_weights(folder)


def test_shards_are_not_read_from_outside(tmp_path: Path) -> None:
    saved(tmp_path / "other")
    folder = saved(tmp_path / "part")
    index = {"weight_map": {"layer.0": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnclipError, match=r"\.\./other/model\.safetensors is missing"):
        bundle.load_weights(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"layer.0": 3}}])
def test_damaged_index_is_explained(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = saved(tmp_path / "part")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnclipError, match=r"index\.json names no weights"):
        bundle.load_weights(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04pickle."])
def test_damaged_weights_are_explained(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path / "part")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UnclipError, match="damaged or not a safetensors file"):
        bundle.load_part(folder, "prior", DiffusionConfig)


def test_truncated_weights_are_explained(tmp_path: Path) -> None:
    file = saved(tmp_path / "part") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnclipError, match="damaged or not a safetensors file"):
        bundle.load_weights(tmp_path / "part")


def test_parts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for name, found in (("nowhere", "no such folder"), ("empty", "nothing"), ("other", "notes.txt")):
        with pytest.raises(UnclipError, match=rf"config\.json is missing \(found: {found}\)"):
            bundle.load_part(tmp_path / name, "prior", DiffusionConfig)


def test_part_of_another_kind_or_format(tmp_path: Path) -> None:
    folder = saved(tmp_path / "part")
    with pytest.raises(UnclipError, match="holds a 'prior', expected a 'decoder'"):
        bundle.load_part(folder, "decoder", DiffusionConfig)
    change(folder / "config.json", lambda body: body.update(format=99))
    with pytest.raises(UnclipError, match="format 99, this version reads format 1"):
        bundle.load_part(folder, "prior", DiffusionConfig)
    (folder / "config.json").write_text("{")
    with pytest.raises(UnclipError, match=r"config\.json cannot be read as JSON"):
        bundle.load_part(folder, "prior", DiffusionConfig)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UnclipError, match="holds a list, expected a JSON object"):
        bundle.load_part(folder, "prior", DiffusionConfig)


def test_part_with_a_bad_configuration_names_file_and_key(tmp_path: Path) -> None:
    folder = saved(tmp_path / "part")
    change(folder / "config.json", lambda body: body["config"].update(timestep=3))
    with pytest.raises(UsageError, match=r"config\.json: unknown key 'timestep'; did you mean 'timesteps'"):
        bundle.load_part(folder, "prior", DiffusionConfig)
    change(folder / "config.json", lambda body: body.update(config=[]))
    with pytest.raises(UsageError, match=r"config\.json: configuration: "):
        bundle.load_part(folder, "prior", DiffusionConfig)


# ---- weights that must fit ---------------------------------------------------------------------------------


def test_strict_loading_takes_what_fits() -> None:
    module, source = nn.Linear(3, 2), nn.Linear(3, 2)
    bundle.load_strict(module, source.state_dict(), Path("there"))
    assert torch.equal(module.weight, source.weight) and torch.equal(module.bias, source.bias)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"weight": torch.ones(2, 3)}, "missing bias$"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "b": torch.ones(1)}, "unknown b$"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"weight is \(3, 2\), expected \(2, 3\)$"),
        ({name: torch.ones(1) for name in "abcde"}, "missing bias; missing weight; unknown a and 4 more$"),
    ],
)
def test_strict_loading_names_what_does_not_fit(state: dict[str, Tensor], message: str) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(UnclipError, match=f"the weights in there do not fit its config.json: .*{message}"):
        bundle.load_strict(module, state, Path("there"))
    assert torch.equal(module.weight, before)


def test_a_loaded_network_holds_the_tensors_that_were_read() -> None:
    """And not copies of them, so that weights are in memory once."""
    state = nn.Linear(3, 2).state_dict()
    network = bundle.load_network(lambda: nn.Linear(3, 2), state, Path("there"))
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(UnclipError, match=r"do not fit .* missing bias"):
        bundle.load_network(lambda: nn.Linear(3, 2), {"weight": state["weight"]}, Path("there"))


def test_what_a_constructor_computes_beside_the_weights_is_there() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("steps", torch.arange(4), persistent=False)

    source = nn.Linear(3, 2)
    network = bundle.load_network(Counting, source.state_dict(), Path("there"))
    assert torch.equal(network.steps, torch.arange(4)) and torch.equal(network.weight, source.weight)  # type: ignore[arg-type]


def test_weights_of_another_type_get_that_of_the_network() -> None:
    state = {name: tensor.double() for name, tensor in nn.Linear(3, 2).state_dict().items()}
    network = bundle.load_network(lambda: nn.Linear(3, 2), state, Path("there"))
    assert network.weight.dtype == torch.float32


def test_weights_in_use_do_not_follow_their_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "part")
    state = bundle.load_weights(folder)
    before = {name: tensor.clone() for name, tensor in state.items()}
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # in place: a mapped tensor would read zeros
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


# ---- replacement -------------------------------------------------------------------------------------------


def test_a_part_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "part")
    (folder / "stale.safetensors").touch()
    bundle.save_part(folder, "decoder", CONFIG, {"one": torch.ones(1)})
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert set(bundle.load_weights(folder)) == {"one"}
    assert [p.name for p in tmp_path.iterdir()] == ["part"]  # nothing temporary stays
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_failed_save_leaves_the_old_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "part")

    def full_disk(*_args: object, **_options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        bundle.save_part(folder, "prior", CONFIG, {"one": torch.ones(1)})
    assert set(bundle.load_weights(folder)) == set(weights())
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What the system refuses to write beyond, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [50, 1000], ids=["json", "weights"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, size: int) -> None:
    """Both where Python writes and where safetensors does, and the folder that was there stays."""
    folder = saved(tmp_path / "part")
    with files_of_at_most(size), pytest.raises(UnclipError, match=r"^cannot write .*part: File too large$"):
        saved(tmp_path / "part")
    assert set(bundle.load_weights(folder)) == set(weights())
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_replacement_that_is_interrupted_leaves_the_old_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = saved(tmp_path / "part"), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == folder and not self.name.startswith(".tmp-old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundle.save_part(folder, "prior", CONFIG, {"one": torch.ones(1)})
    assert set(bundle.load_weights(folder)) == set(weights())
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_folder_of_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match=r"^cannot write .*: File name too long$"):
        saved(tmp_path / ("a" * 300))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnclipError, match=r"cannot write to .*file"):
        saved(tmp_path / "file" / "part")


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "body.json"
    bundle.write_json(file, {"word": "ünïcode"})
    assert bundle.read_json(file) == {"word": "ünïcode"} and "ünïcode" in file.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        bundle.write_json(file, {"bad": object()})
    assert bundle.read_json(file) == {"word": "ünïcode"}
    assert [p.name for p in tmp_path.iterdir()] == ["body.json"]


# ---- manifests ---------------------------------------------------------------------------------------------


def whole(folder: Path, **changes: Any) -> Path:
    for name in ("clip", "decoder"):
        (folder / name).mkdir(parents=True)
    body = {"format": 1, "parts": {"clip": "clip", "decoder": "decoder"}, "name": "x", **changes}
    bundle.write_json(folder / bundle.MANIFEST, body)
    return folder


def test_manifest_is_read(tmp_path: Path) -> None:
    manifest = bundle.read_manifest(whole(tmp_path / "model"))
    assert manifest["parts"] == {"clip": "clip", "decoder": "decoder"} and manifest["name"] == "x"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "format 2, this version reads format 1"),
        ({"format": None}, "format None"),
        ({"parts": {}}, "names no parts"),
        ({"parts": ["clip"]}, "names no parts"),
        ({"parts": {"clip": 3}}, "names no parts"),
        ({"parts": {"clip": "clip", "prior": "prior"}}, r"part 'prior' is missing \(present: clip\)"),
        ({"parts": {"prior": "prior"}}, r"part 'prior' is missing \(present: none of them\)"),
        ({"parts": {"clip": "../outside"}}, r"part 'clip' outside the bundle \('\.\./outside'\)"),
        ({"parts": {"clip": "/elsewhere"}}, "part 'clip' outside the bundle"),
        ({"parts": {"clip": "."}}, "part 'clip' outside the bundle"),
    ],
)
def test_manifest_that_is_not_whole(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "outside").mkdir()
    with pytest.raises(UnclipError, match=message):
        bundle.read_manifest(whole(tmp_path / "model", **changes))


def test_a_link_out_of_the_bundle_is_the_users_own_wish(tmp_path: Path) -> None:
    """In a folder of one's own; in what was downloaded it is refused."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "blobs").mkdir()
    for folder in (tmp_path / "model", tmp_path / "snapshots" / "abc"):
        whole(folder, parts={"clip": "link"})
        (folder / "link").symlink_to(tmp_path / "outside")
    assert bundle.read_manifest(tmp_path / "model")["parts"] == {"clip": "link"}
    with pytest.raises(UnclipError, match=r"link is a link to .*outside, outside the model's folder"):
        bundle.read_manifest(tmp_path / "snapshots" / "abc")


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match=r"no model folder at .*nowhere.*unclip\.json"):
        bundle.read_manifest(tmp_path / "nowhere")
    saved(tmp_path / "part")
    with pytest.raises(UnclipError, match=r"unclip\.json is missing \(found: config\.json, model\.saf"):
        bundle.read_manifest(tmp_path / "part")
    (tmp_path / "part" / "unclip.json").write_text("nonsense")
    with pytest.raises(UnclipError, match="cannot be read as JSON"):
        bundle.read_manifest(tmp_path / "part")
