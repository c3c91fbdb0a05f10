"""Models from and to a Hub through the Hub's own client, over HTTP, with the server of hub_server.py in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import TOKEN, Hub, Repo, serving
from huggingface_hub import constants, file_download
from safetensors import safe_open

from unclip import hub as door
from unclip.bundle import read_manifest, resolve_model
from unclip.errors import UnclipError
from unclip.pipeline import UnCLIP
from unclip.publishing import push_to_hub

Run = Callable[..., tuple[int, str, str]]
WEIGHTS = {"clip/open_clip_model.safetensors", *(f"{part}/model.safetensors" for part in ("prior", "decoder"))}
UPSAMPLERS = ["upsampler_256/model.safetensors", "upsampler_1024/model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With `tiny_bundle` as user/model. The client's constants are what HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE and
    HF_HUB_DISABLE_XET set when it is imported.
    """
    with serving() as server:
        server.add("user/model", tiny_bundle)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        places = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", places)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_comes_over_http(hub: Hub, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = UnCLIP.from_pretrained("user/model", device="cpu")
    files = list(tiny_bundle.rglob("*.safetensors"))
    size = door.told_size(sum(file.stat().st_size for file in files))
    sha = hub.repos["user/model"].refs["main"]
    told = f"downloading user/model, revision {sha[:12]}: {len(files)} files, {size}, into {constants.HF_HUB_CACHE}"
    assert told in capsys.readouterr().err
    assert model.sizes == (64, 256, 1024)
    assert (model.sample("pizza", size=64, output="tensor") == UnCLIP.from_pretrained(tiny_bundle, device="cpu").sample(
        "pizza", size=64, output="tensor")).all()  # fmt: skip
    count = len(hub.fetched())
    UnCLIP.from_pretrained("user/model", device="cpu", size=64)
    assert len(hub.fetched()) == count  # all of it is there


def test_in_part_and_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UnCLIP.from_pretrained("user/model", device="cpu", size=64)
    assert model.sizes == (64,)
    assert {name for name in hub.fetched() if name.endswith("safetensors")} == WEIGHTS
    offline(monkeypatch)
    count = len(hub.asked)
    assert UnCLIP.from_pretrained("user/model", device="cpu", size=64).sizes == (64,)
    with pytest.raises(UnclipError, match=r"upsampler_256 has no weights: model\.safetensors is missing"):
        UnCLIP.from_pretrained("user/model", device="cpu")
    with pytest.raises(UnclipError, match="HF_HUB_OFFLINE is set, and the Hub's cache holds no model of that name"):
        resolve_model("user/other")
    assert len(hub.asked) == count  # nothing was asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    UnCLIP.from_pretrained("user/model", device="cpu", size=256)
    assert hub.fetched()[-1] == UPSAMPLERS[0]


def test_a_hub_that_cannot_be_reached(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve_model("user/model", parts=lambda _: ["decoder"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert (resolve_model("user/model") / "decoder" / "model.safetensors").is_file()
    assert "the Hub cannot be reached; user/model is taken from the cache" in capsys.readouterr().err
    with pytest.raises(UnclipError, match=r"cannot be reached .*, and the Hub's cache holds no model of that name"):
        resolve_model("user/other")


def test_revisions(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    first = hub.repos["user/model"].refs["main"]
    newer = tmp_path / "newer"
    shutil.copytree(tiny_bundle, newer)
    manifest = json.loads((newer / "unclip.json").read_text())
    (newer / "unclip.json").write_text(json.dumps({**manifest, "version": "2"}))
    hub.repos["user/model"].refs["v1"] = first
    hub.add("user/model", newer)

    def version(name: str, revision: str | None = None) -> str:
        return str(read_manifest(resolve_model(name, revision, parts=lambda _: []))["version"])

    assert version("user/model") == "2"
    assert {version("user/model@v1"), version("user/model", "v1"), version(f"user/model@{first}")} == {"1"}
    with pytest.raises(UnclipError, match=r"no model of that name at 'v9': the repository has no such revision"):
        version("user/model@v9")


def test_a_broken_download_goes_on(hub: Hub, tiny_bundle: Path) -> None:
    """A connection that breaks is taken up where it broke; a call that failed leaves what is whole to the next one."""
    size = (tiny_bundle / "decoder" / "model.safetensors").stat().st_size
    hub.cut["decoder/model.safetensors"] = size // 2
    hub.broken.add("prior/model.safetensors")
    wanted = ["decoder", "prior"]
    with pytest.raises(UnclipError, match=r"user/model could not be downloaded: .*; run it again to continue"):
        resolve_model("user/model", parts=lambda _: wanted)
    hub.broken.clear()
    if not hub.cut:  # files come side by side: the failure may have come before the other file was asked for
        hub.cut["decoder/model.safetensors"] = size // 2
    folder = resolve_model("user/model", parts=lambda _: wanted)
    ranges = [found for _, path, found in hub.asked if path.endswith("decoder/model.safetensors") and found]
    assert ranges and all(int(found.removeprefix("bytes=").rstrip("-")) > 0 for found in ranges)
    for part in wanted:
        name = f"{part}/model.safetensors"
        assert (folder / name).read_bytes() == (tiny_bundle / name).read_bytes()


@pytest.mark.parametrize("kind", ["missing", "private", "gated"])
def test_what_one_may_not_have(hub: Hub, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind != "missing":
        hub.add("user/other", tiny_bundle)
        setattr(hub.repos["user/other"], kind, True)
    match = "it is gated; accept its terms" if kind == "gated" else "there is no such repository, or it is private"
    with pytest.raises(UnclipError, match=match):
        resolve_model("user/other")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if kind == "missing":
        with pytest.raises(UnclipError, match=match):
            resolve_model("user/other")
    else:
        assert read_manifest(resolve_model("user/other", parts=lambda _: []))["name"] == "tiny"


def test_info_takes_headers_and_no_weights(hub: Hub, tiny_bundle: Path, run_cli: Run) -> None:
    code, out, _ = run_cli("info", "--model", "user/model", "--json")
    there = json.loads(out)["model"]
    code_here, out, _ = run_cli("info", "--model", tiny_bundle, "--json")
    here = json.loads(out)["model"]
    assert (code, code_here) == (0, 0)
    same = ("name", "version", "license", "bytes", "sizes", "parts", "example_prompts")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    snapshot = Path(there["folder"])
    assert not list(snapshot.rglob("*.safetensors"))
    ranges = {found for _, path, found in hub.asked if path.endswith(".safetensors")}
    assert ranges == {"bytes=0-100000"}


def test_info_of_somebody_elses_checkpoint(hub: Hub, tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "decoder").mkdir(parents=True)
    shutil.copyfile(tiny_bundle / "decoder" / "model.safetensors", foreign / "decoder" / "model.safetensors")
    (foreign / "model_index.json").write_text("{}")
    hub.add("user/karlo", foreign)
    code, out, _ = run_cli("info", "--model", "user/karlo", "--json")
    told = json.loads(out)["model"]["parts"]["decoder"]
    with safe_open(foreign / "decoder" / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert code == 0 and told["parameters"] == count
    hub.repos["user/empty"] = Repo()
    hub.repos["user/empty"].commit({"README.md": b"nothing"})
    code, _, err = run_cli("info", "--model", "user/empty")
    assert code == 1 and "holds neither unclip.json nor folders with weights" in err


def test_upscale_takes_the_upsamplers_alone(hub: Hub, tmp_path: Path, run_cli: Run) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save(tmp_path / "small.png")
    given = ["upscale", tmp_path / "small.png", "--model", "user/model", "--quiet", "--out"]
    code, _, err = run_cli(*given, tmp_path / "middle.png", "--size", 256)
    assert code == 0, err
    assert [name for name in hub.fetched() if name.endswith("safetensors")] == UPSAMPLERS[:1]
    code, _, err = run_cli(*given, tmp_path / "large.png")
    assert code == 0, err
    assert sorted(name for name in hub.fetched() if name.endswith("safetensors")) == sorted(UPSAMPLERS)
    with Image.open(tmp_path / "large.png") as large:
        assert large.size == (1024, 768)


def test_a_plan_and_a_clip_take_what_they_need(hub: Hub, tiny_bundle: Path) -> None:
    from unclip.parts import load_clip
    from upsamplers.config import UpsamplerRunConfig
    from upsamplers.start import read_shape, with_start

    run = UpsamplerRunConfig(init_from="user/model")
    config, _ = with_start(run, read=read_shape)
    assert config.model.unet.patch_size == 16 and not [n for n in hub.fetched() if n.endswith("safetensors")]
    load_clip("user/model", "cpu")
    assert [name for name in hub.fetched() if name.endswith("safetensors")] == ["clip/open_clip_model.safetensors"]


def test_what_is_pushed_comes_back(
    hub: Hub, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Run
) -> None:
    given = ["push", "--model", tiny_bundle, "--to", "user/new", "--data", "drawn emoji"]
    code, _, err = run_cli(*given)
    assert code == 1 and "user/new could not be written: the token gives no access to it" in err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, _, err = run_cli(*given[:4], "somebody/new")
    assert code == 1 and "somebody/new could not be written: the token gives no access" in err
    code, out, err = run_cli(*given, "--private", "--revision", "v1")
    repo = hub.repos["user/new"]
    assert code == 0 and out == f"{hub.endpoint}/user/new/commit/{repo.refs['v1']}\n", err
    assert repo.private and repo.messages[-1] == "Upload tiny" and set(repo.refs) == {"main", "v1"}
    pushed = repo.commits[repo.refs["v1"]]
    own = {str(file.relative_to(tiny_bundle)): file.read_bytes() for file in tiny_bundle.rglob("*") if file.is_file()}
    assert {name: data for name, data in pushed.items() if name in own} == own
    assert b"drawn emoji" in pushed["README.md"]
    uploads = len([1 for verb, _, _ in hub.asked if verb == "PUT"])
    again: Any = push_to_hub(tiny_bundle, "user/new", data="drawn emoji", message="Again")
    assert repo.messages[-1] == "Again" and again.endswith(repo.refs["main"])
    assert len([1 for verb, _, _ in hub.asked if verb == "PUT"]) == uploads  # the Hub has the weights already
    model = UnCLIP.from_pretrained("user/new@v1", device="cpu", size=64)
    assert model.name == "tiny"


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_clips_and_autoencoders_take_the_same_token(
    hub: Hub, tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Other libraries fetch them; what to do about a refusal is said all the same."""
    from diffusers import AutoencoderKL

    from unclip.autoencoder import FrozenAutoencoder
    from unclip.clip import FrozenCLIP

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "autoencoder")
    hub.add("user/clip", tiny_clip_folder)
    hub.add("user/autoencoder", tmp_path / "autoencoder")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)  # made when it was imported
    vocabulary = "bpe_vocabulary.txt.gz"
    shutil.copy(tiny_clip_folder / vocabulary, tmp_path / vocabulary)  # open_clip looks for it where the command runs
    for name in ("clip", "autoencoder"):
        setattr(hub.repos[f"user/{name}"], kind, True)
    for load in (lambda: FrozenCLIP.load("hf-hub:user/clip"), lambda: FrozenAutoencoder.load("user/autoencoder")):
        with pytest.raises(UnclipError, match="log in with `hf auth login` or set HF_TOKEN"):
            load()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert FrozenAutoencoder.load("user/autoencoder").facts.factor == 1
    assert FrozenCLIP.load("hf-hub:user/clip").embedding_dim == 16
