"""Models from and to the Hub, with its own cache on disk and a client that never leaves this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers_karlo import SIZE, make_karlo
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from unclip import hub
from unclip.bundle import read_manifest, resolve_model
from unclip.errors import UnclipError, UsageError
from unclip.pipeline import UnCLIP
from unclip.publishing import model_card, push_to_hub
from unclip.upscaling import Upscaler

SHA, OLD = "a" * 40, "b" * 40
Run = Callable[..., tuple[int, str, str]]


class FakeHub:
    """Repositories as folders on disk. It writes the cache's layout: blobs, snapshots of links, refs."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repos: dict[str, dict[str, Path]] = {}  # repo -> revision's sha -> folder
        self.refs: dict[str, dict[str, str]] = {}
        self.fetched: list[str] = []
        self.down: Exception | None = None
        self.commits: list[dict[str, Any]] = []

    def add(self, repo: str, folder: Path, sha: str = SHA, ref: str = "main") -> None:
        self.repos.setdefault(repo, {})[sha] = folder
        self.refs.setdefault(repo, {})[ref] = sha

    def _sha(self, repo: str, revision: str | None) -> str:
        if self.down is not None:
            raise self.down
        known = self.repos.get(repo, {})
        sha = self.refs.get(repo, {}).get(revision or "main", revision or "")
        if sha not in known:
            response: Any = SimpleNamespace(status_code=404, headers={}, request=None, url="", text="")
            raise RepositoryNotFoundError(f"404 Client Error: no {repo}", response=response)
        return sha

    def model_info(self, repo: str, revision: str | None = None, files_metadata: bool = False) -> Any:
        assert files_metadata
        sha = self._sha(repo, revision)
        folder = self.repos[repo][sha]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        siblings = [SimpleNamespace(rfilename=str(f.relative_to(folder)), size=f.stat().st_size) for f in files]
        return SimpleNamespace(sha=sha, siblings=siblings)

    def snapshot_download(self, repo: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        sha = self._sha(repo, revision)
        root = self.cache / f"models--{repo.replace('/', '--')}"
        for folder in ("blobs", "refs", f"snapshots/{sha}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "refs" / (revision or "main")).write_text(sha)
        source = self.repos[repo][sha]
        for file in sorted(source.rglob("*")):
            name = str(file.relative_to(source))
            link = root / "snapshots" / sha / name
            if not file.is_file() or not any(fnmatch(name, pattern) for pattern in allow_patterns) or link.exists():
                continue
            self.fetched.append(name)
            blob = root / "blobs" / f"{sha[:4]}-{name.replace('/', '-')}"
            shutil.copyfile(file, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return str(root / "snapshots" / sha)

    def create_repo(self, repo: str, **options: Any) -> None:
        self._sha("user/model", None)
        self.commits.append({"repo": repo, **options})

    def create_branch(self, repo: str, **options: Any) -> None:
        self.commits[-1]["branch"] = options["branch"]

    def create_commit(self, repo: str, operations: Any, commit_message: str, revision: str | None) -> Any:
        files = {one.path_in_repo: one.path_or_fileobj for one in operations}
        self.commits[-1] |= {"files": files, "message": commit_message, "revision": revision}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")


@pytest.fixture
def fake(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    cache = tmp_path / "hub"
    found = FakeHub(cache)
    found.add("user/model", tiny_bundle)
    monkeypatch.setattr(hub, "client", lambda: found)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return found


def go_offline(monkeypatch: pytest.MonkeyPatch, fake: FakeHub) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake.down = AssertionError("the Hub was asked")


def test_a_model_is_fetched_once_and_its_size_told_before(
    fake: FakeHub, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = UnCLIP.from_pretrained("user/model", device="cpu")
    told = capsys.readouterr().err
    weights = list(tiny_bundle.rglob("*.safetensors"))
    size = hub.told_size(sum(file.stat().st_size for file in weights))
    assert f"downloading user/model, revision {SHA[:12]}: {len(weights)} files, {size}, into {fake.cache}" in told
    assert model.sizes == (64, 256, 1024)
    count = len(fake.fetched)
    UnCLIP.from_pretrained("user/model", device="cpu")
    assert len(fake.fetched) == count and capsys.readouterr().err == ""
    go_offline(monkeypatch, fake)
    again = UnCLIP.from_pretrained("user/model", device="cpu")
    assert again.sizes == model.sizes


def test_a_small_size_leaves_the_upsamplers_on_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UnCLIP.from_pretrained("user/model", device="cpu", size=64)
    assert model.sizes == (64,)
    assert "decoder/model.safetensors" in fake.fetched and "upsampler_256/config.json" in fake.fetched
    assert not any(name.startswith("upsampler") and name.endswith("safetensors") for name in fake.fetched)
    larger = UnCLIP.from_pretrained("user/model", device="cpu", size=256)
    assert larger.sizes == (64, 256)
    new = fake.fetched[-1:]
    assert new == ["upsampler_256/model.safetensors"]
    with pytest.raises(UsageError, match="512"):
        UnCLIP.from_pretrained("user/model", device="cpu", size=512)
    go_offline(monkeypatch, fake)
    with pytest.raises(UnclipError, match=r"upsampler_1024 has no weights: model\.safetensors is missing"):
        UnCLIP.from_pretrained("user/model", device="cpu")


def test_revisions_are_pinned(
    fake: FakeHub, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    shutil.copytree(tiny_bundle, older)
    manifest = json.loads((older / "unclip.json").read_text())
    (older / "unclip.json").write_text(json.dumps({**manifest, "version": "0"}))
    fake.add("user/model", older, OLD, "v0")
    for asked in (("user/model@v0", None), ("user/model", "v0"), (f"user/model@{OLD}", None)):
        assert read_manifest(resolve_model(*asked))["version"] == "0"
    assert read_manifest(resolve_model("user/model"))["version"] == "1"
    go_offline(monkeypatch, fake)
    assert read_manifest(resolve_model("user/model", "v0"))["version"] == "0"
    with pytest.raises(UnclipError, match=r"HF_HUB_OFFLINE is set, .*no model of that name at revision 'v9'"):
        resolve_model("user/model@v9")
    with pytest.raises(UsageError, match="give one of them"):
        resolve_model("user/model@v0", "v1")


def test_no_network_no_repository_no_room(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnclipError, match="the Hub gave no model of that name: there is no such repository"):
        resolve_model("user/other")
    fake.down = ConnectionError("no route")
    with pytest.raises(UnclipError, match=r"cannot be reached \(no route\), and the Hub's cache holds no model"):
        resolve_model("user/model")
    fake.down = None
    resolve_model("user/model")
    capsys.readouterr()
    fake.down = ConnectionError("no route")
    assert resolve_model("user/model").name == SHA
    assert "taken from the cache" in capsys.readouterr().err
    fake.down = None
    shutil.rmtree(fake.cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UnclipError, match="has room for 10 bytes"):
        resolve_model("user/model")


@pytest.mark.parametrize("text", ["a", "a/b/c", "./a/b", "/a/b", "~/a", "a/", "../b", "a/b@", "a/..", "C:\\a"])
def test_paths_are_no_names(text: str) -> None:
    assert hub.parse_name(text) is None


def test_links_in_a_folder_of_ones_own_are_followed_and_not_published(tmp_path: Path, tiny_bundle: Path) -> None:
    """Weights may lie elsewhere, a file or a whole part; what is uploaded lies in the folder itself."""
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(tiny_bundle, folder)
    elsewhere.mkdir()
    for name in ("decoder/model.safetensors", "prior"):
        place = elsewhere / name.replace("/", "-")
        (folder / name).rename(place)
        (folder / name).symlink_to(place)
    assert UnCLIP.from_pretrained(folder, device="cpu", size=64).prior is not None
    for name in ("decoder/model.safetensors", "prior"):
        with pytest.raises(UnclipError, match=r"is a link to .*elsewhere.*, outside the model's folder; put the file"):
            push_to_hub(folder, "user/model", license="mit", dry_run=True)
        target = (folder / name).resolve()
        (folder / name).unlink()
        target.rename(folder / name)
    shutil.copyfile(tiny_bundle / "decoder" / "model.safetensors", folder / "decoder" / "real.bin")
    (folder / "decoder" / "model.safetensors").unlink()
    (folder / "decoder" / "model.safetensors").symlink_to("real.bin")  # a link that stays inside
    assert push_to_hub(folder, "user/model", license="mit", dry_run=True)


def test_links_out_of_what_was_downloaded_are_refused(fake: FakeHub, tmp_path: Path) -> None:
    folder = resolve_model("user/model")
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"not for everyone")
    assert read_manifest(folder)["name"] == "tiny"  # its own links lead to the cache's blobs
    for name in ("decoder/model.safetensors", "decoder/deep/x.json", "LICENSE"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(UnclipError, match=r"is a link to .*secret\.safetensors, outside"):
            read_manifest(folder)
        (folder / name).unlink()
    shutil.move(folder / "prior", tmp_path / "prior")
    (folder / "prior").symlink_to(tmp_path / "prior")
    with pytest.raises(UnclipError, match=r"prior is a link to .*prior, outside"):
        read_manifest(folder)


def test_parts_out_of_the_folder_are_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "unclip.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    for place in ("../elsewhere", str(tmp_path / "elsewhere"), ".", "", "decoder/../.."):
        body = {**manifest, "parts": {**manifest["parts"], "prior": place}}
        (folder / "unclip.json").write_text(json.dumps(body))
        with pytest.raises(UnclipError, match="outside the bundle"):
            read_manifest(folder)


def test_push_uploads_the_bundle_and_nothing_else(
    fake: FakeHub, tmp_path: Path, tiny_bundle: Path, run_cli: Run
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(tiny_bundle, folder)
    (folder / "notes.txt").write_text("secret")
    (folder / "decoder" / "optimizer.pt").write_text("large")
    (tmp_path / "metrics.json").write_text('{"FID": 12.5, "CLIP score": 0.31}')
    given = ["push", "--model", folder, "--to", "user/new", "--data", "drawn emoji", "--dataset", "a/b"]
    code, out, err = run_cli(*given, "--metrics", tmp_path / "metrics.json", "--dry-run")
    assert (code, fake.commits) == (0, []) and "would upload" in err
    code, out, err = run_cli(*given, "--metrics", tmp_path / "metrics.json", "--private", "--revision", "v1")
    assert code == 0 and out == "https://huggingface.co/user/new/commit/1\n"
    (commit,) = fake.commits
    assert (commit["repo"], commit["private"], commit["branch"], commit["revision"]) == ("user/new", True, "v1", "v1")
    names = set(commit["files"])
    assert {"unclip.json", "README.md", "clip/bpe_vocabulary.txt.gz", "upsampler_1024/model.safetensors"} <= names
    assert not {"notes.txt", "decoder/optimizer.pt"} & names
    card = commit["files"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["pipeline_tag"], front["datasets"]) == ("apache-2.0", "text-to-image", ["a/b"])
    assert "unclip" in front["tags"]
    measured = front["model-index"][0]["results"][0]["metrics"]
    assert [(one["name"], one["value"]) for one in measured] == [("FID", 12.5), ("CLIP score", 0.31)]
    assert "drawn emoji" in card and "unclip sample --model user/new --prompt pizza" in card


def test_what_was_pushed_can_be_loaded(fake: FakeHub, tmp_path: Path, tiny_bundle: Path) -> None:
    push_to_hub(tiny_bundle, "user/new")
    uploaded = tmp_path / "uploaded"
    for name, content in fake.commits[0]["files"].items():
        (uploaded / name).parent.mkdir(parents=True, exist_ok=True)
        (uploaded / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
    fake.add("user/new", uploaded)
    here, there = (UnCLIP.from_pretrained(name, device="cpu", size=64) for name in (tiny_bundle, "user/new"))
    first, second = (model.sample("pizza", seed=1, size=64, output="tensor") for model in (here, there))
    assert (first == second).all()


def test_bad_pushes_have_a_sentence(fake: FakeHub, tmp_path: Path, tiny_bundle: Path, run_cli: Run) -> None:
    for name in ("model", "user/model@v1", "a/b/c"):
        code, _, err = run_cli("push", "--model", tiny_bundle, "--to", name)
        assert code == 2 and "expected user/name" in err
    folder = tmp_path / "mine"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "unclip.json").read_text())
    del manifest["license"]
    (folder / "unclip.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="does not tell its licence"):
        model_card(folder)
    (tmp_path / "metrics.json").write_text('{"FID": "good"}')
    code, _, err = run_cli("push", "--model", tiny_bundle, "--to", "a/b", "--metrics", tmp_path / "metrics.json")
    assert code == 2 and "the metric 'FID' is 'good'" in err
    fake.down = ConnectionError("no route")
    with pytest.raises(UnclipError, match="user/new could not be written: no route"):
        push_to_hub(tiny_bundle, "user/new")


def test_upscaling_takes_the_upsampler_alone_of_a_foreign_repository(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither fetched nor converted is anything but the super-resolution."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "converted"))
    source = make_karlo(tmp_path / "karlo")
    fake.add("user/karlo", source)
    capsys.readouterr()
    model = Upscaler.from_pretrained("user/karlo", device="cpu")
    weights = {name.split("/")[0] for name in fake.fetched if name.endswith(".safetensors")}
    assert weights == {"super_res_first", "super_res_last"}
    assert [stage.config.high_size for stage in model.upsamplers] == [4 * SIZE]
    told = capsys.readouterr().err
    assert "downloading user/karlo" in told and "converting the upsampler of" in told
    count = len(fake.fetched)
    Upscaler.from_pretrained("user/karlo", device="cpu")
    assert len(fake.fetched) == count and "converting" not in capsys.readouterr().err
    local = Upscaler.from_pretrained(source, device="cpu")
    for name, tensor in local.upsamplers[0].network.state_dict().items():
        assert torch.equal(tensor, model.upsamplers[0].network.state_dict()[name])
    file = source / "super_res_first" / "config.json"
    file.write_text(file.read_text().replace("UNet2DModel", "Another"))
    with pytest.raises(UnclipError, match="holds a 'Another', expected a 'UNet2DModel'"):
        Upscaler.from_pretrained(source, device="cpu")


def test_what_is_downloaded_of_a_foreign_repository() -> None:
    """Nothing pickled, no pictures, and half-precision variants only where there is nothing else."""
    names = ["model_index.json", "prior/a.safetensors", "prior/a.fp16.safetensors", "prior/a.bin", "x.png"]
    names += ["decoder/b.fp16.safetensors", "tokenizer/merges.txt"]
    assert sorted(hub.matching(dict.fromkeys(names, 1), hub.CHECKPOINT)) == [
        "decoder/b.fp16.safetensors", "model_index.json", "prior/a.safetensors", "tokenizer/merges.txt"
    ]  # fmt: skip
