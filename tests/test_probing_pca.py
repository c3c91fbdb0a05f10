"""Principal components of CLIP image embeddings: measured, kept in a bundle, an image rebuilt from the first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bundle import make_bundle
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip import UnCLIP, UnclipError, UsageError
from unclip.assemble import assemble
from unclip.bundle import read_manifest, resolve_model
from unclip.components import PrincipalComponents, decompose, fit_components
from unclip.parts import load_clip
from unclip.probing import PAPER_DIMS

Run = Callable[..., tuple[int, str, str]]
DATA = Path(__file__).parent / "data"


def spread_out(count: int, width: int = 12) -> Tensor:
    """Embeddings whose variances along hidden axes fall by 4 from one to the next."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scales = 2.0 ** -torch.arange(width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ axes + 1


@pytest.fixture(scope="module")
def with_pca(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a PCA of random unit vectors."""
    folder = tmp_path_factory.mktemp("pca") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    rows = torch.nn.functional.normalize(torch.randn(100, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    fit_components(rows, data="drawn").save(folder / "pca")
    manifest = json.loads((folder / "unclip.json").read_text())
    manifest["parts"]["pca"] = "pca"
    (folder / "unclip.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def model(with_pca: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(with_pca, device="cpu", size=64)


def picture() -> Image.Image:
    return Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 20).convert("RGB")


# ---- the numbers -------------------------------------------------------------------------------------------


def test_components_are_the_singular_vectors() -> None:
    data = spread_out(500)
    found = decompose(data)
    centred = data - data.mean(0)
    _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(found.variances, singular**2 / len(data), rtol=1e-9, atol=1e-15)
    assert torch.allclose((found.components * vectors).sum(1).abs(), torch.ones(12, dtype=torch.float64), atol=1e-6)
    largest = found.components.gather(1, found.components.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_the_error_falls_with_every_dimension() -> None:
    data = spread_out(300).float()
    components = fit_components(data)
    fresh = spread_out(310)[300:].float()
    errors = torch.stack([(fresh - components.reconstruct(fresh, k)).norm(dim=1) for k in range(13)])
    assert bool((errors[1:] <= errors[:-1] + 1e-6).all())
    assert float(errors[0].min()) > 0.1 and float(errors[-1].max()) < 1e-5
    assert torch.equal(components.reconstruct(fresh, 0), components.mean.expand_as(fresh))
    assert components.explained(12) == pytest.approx(1) and 0.7 < components.explained(1) < 0.8


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(UsageError, match="1 embeddings have no principal components"):
        fit_components(torch.ones(1, 4))
    alike = torch.nn.functional.normalize(torch.randn(1, 64), dim=1).expand(50, -1)
    with pytest.raises(UsageError, match="all alike; a PCA needs images that differ"):
        fit_components(alike)


def test_few_embeddings_tell_few_dimensions() -> None:
    few = fit_components(spread_out(5))
    assert few.count == 4
    with pytest.raises(UsageError, match=r"the 5 embeddings measured tell 4; fit the PCA on more images"):
        few.reconstruct(torch.ones(1, 12), 5)
    flat = torch.cat([torch.randn(50, 3), torch.ones(50, 9)], dim=1)  # nothing varies beyond three
    whole = fit_components(flat)
    assert whole.count == 3
    assert torch.equal(whole.reconstruct(flat, 12), whole.reconstruct(flat, 3))


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    found = fit_components(spread_out(40), data="drawn")
    found.save(tmp_path / "pca")
    back = PrincipalComponents.load(tmp_path / "pca")
    assert back.config == found.config
    for name in ("mean", "components", "variances"):
        assert torch.equal(getattr(back, name), getattr(found, name))


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "pca"
    fit_components(spread_out(40)).save(folder)
    state = load_file(folder / "model.safetensors")
    save_file({"mean": state["mean"]}, folder / "model.safetensors")
    with pytest.raises(UnclipError, match="holds mean; a PCA has components, mean, variances"):
        PrincipalComponents.load(folder)
    save_file({**state, "components": state["components"][:3].clone()}, folder / "model.safetensors")
    with pytest.raises(UnclipError, match=r"components has shape \(3, 12\), its config.json says \(12, 12\)"):
        PrincipalComponents.load(folder)
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "kind": "prior"}))
    with pytest.raises(UnclipError, match="holds a 'prior', expected a 'pca'"):
        PrincipalComponents.load(folder)


# ---- with a model ------------------------------------------------------------------------------------------


def test_pictures_of_more_and_more_dimensions(model: UnCLIP) -> None:
    dims = [1, 4, 8, 16]
    found = model.pca(picture(), dims, seed=3)
    assert found.dims == (1, 4, 8, 16) and len(found.images) == 4
    assert list(found.errors) == sorted(found.errors, reverse=True) and found.errors[-1] < 1e-5
    assert found.cosines[-1] == pytest.approx(1, abs=1e-6)
    # The same noise for all: each is what its embedding gives with this seed.
    again = model.decode(found.embeddings, seed=3)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in found.images]
    assert model.pca(picture()).dims == (16,), "the paper's numbers, as far as the model has them"


def test_dimensions_that_cannot_be(model: UnCLIP, tiny_bundle: Path) -> None:
    for dims, message in (
        ([20], r"20 dimensions are asked for, and this CLIP's embeddings have 16"),
        ([4, -1], "-1 dimensions are asked for"),
        ([], "no number of dimensions given"),
    ):
        with pytest.raises(UsageError, match=message):
            model.pca(picture(), dims)
    with pytest.raises(UsageError, match="one image is taken, got 2"):
        model.pca([picture(), picture()], [4])
    older = UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=64)
    with pytest.raises(UnclipError, match=r"holds no PCA.*`unclip fit-pca --model MODEL --data SOURCE`"):
        older.pca(picture())


def test_a_pca_of_another_clip_does_not_fit(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    fit_components(spread_out(40), embedding_length="raw").save(tmp_path / "other")
    folder = make_bundle(tmp_path / "b", {**tiny_parts, "pca": tmp_path / "other"})
    with pytest.raises(UnclipError) as caught:
        UnCLIP.from_pretrained(folder, size=64)
    assert "the CLIP's embeddings have 16 dimensions, the PCA 12" in str(caught.value)
    assert "the PCA is of embeddings of raw length, the decoder takes unit ones" in str(caught.value)


def test_a_bundle_carries_it_in_full_precision(tiny_parts: dict[str, Path], with_pca: Path, tmp_path: Path) -> None:
    parts = {"clip": tiny_parts["clip"], "decoder": tiny_parts["decoder"], "pca": with_pca / "pca"}
    assemble(tmp_path / "bundle", parts)
    assert read_manifest(tmp_path / "bundle")["parts"]["pca"] == "pca"
    back = PrincipalComponents.load(tmp_path / "bundle" / "pca")
    assert torch.equal(back.components, PrincipalComponents.load(with_pca / "pca").components)


def test_the_bundled_models_components() -> None:
    folder = resolve_model("emoji") / "pca"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 300_000
    components = PrincipalComponents.load(folder)
    assert components.config.embedding_dim == 256 and components.config.samples == 1550
    with Image.open(DATA / "emoji_thumbnails.png") as sheet:
        whole = sheet.convert("RGB")
    edge = 32
    cells = [whole.crop((x, y, x + edge, y + edge)) for y in (0, edge) for x in range(0, 5 * edge, edge)]
    clip = load_clip()
    from unclip.parts import image_pixels

    z = clip.encode_image(image_pixels([cell.resize((64, 64)) for cell in cells], clip.image_size))
    dims = sorted({min(k, components.count) for k in PAPER_DIMS})
    errors = torch.stack([(z - components.reconstruct(z, k)).norm(dim=1) for k in dims])
    assert bool((errors[1:] <= errors[:-1] + 1e-6).all())
    # All that this CLIP's image tower can vary in (its width is 128) is measured.
    assert float(errors[0].min()) > 0.2 and float(errors[-1].max()) < 1e-4
    with pytest.raises(UsageError, match=r"320 dimensions are asked for, and this CLIP's embeddings have 256"):
        components.check_dims([20, 320])


# ---- the commands ------------------------------------------------------------------------------------------


def test_fit_pca_and_pca(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    fit = ["fit-pca", "--model", bundle, "--data", "synthetic", "--samples", 40, "--batch-size", 16, "--device", "cpu"]
    code, out, err = run_cli(*fit)
    assert code == 0, err
    assert out.strip() == str(bundle / "pca")
    assert read_manifest(bundle)["parts"]["pca"] == "pca"
    first = (bundle / "pca" / "model.safetensors").read_bytes()
    code, _, err = run_cli(*fit)
    assert code == 1 and "exists; pass --overwrite to replace it" in err
    assert run_cli(*fit, "--overwrite")[0] == 0
    assert (bundle / "pca" / "model.safetensors").read_bytes() == first
    assert run_cli(*fit, "--set", "synthetic.max_objects=1", "--out", tmp_path / "single")[0] == 0
    assert (tmp_path / "single" / "model.safetensors").read_bytes() != first
    code, _, err = run_cli(*fit, "--set", "image_size=8", "--out", tmp_path / "none")
    assert code == 2 and "leave image_size and crop_size out of --set" in err and not (tmp_path / "none").exists()
    picture().save(tmp_path / "set.png")
    draw = ["pca", tmp_path / "set.png", "--model", bundle, "--out", tmp_path / "sheet.png", "--size", 64]
    code, out, err = run_cli(*draw, "--dims", 2, 8, 16, "--json")
    assert code == 0, err
    record: dict[str, Any] = json.loads(out)
    assert record["dims"] == [2, 8, 16] and record["errors"] == sorted(record["errors"], reverse=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 4 * 64 + 3 * 4 and sheet.height > 64
        assert json.loads(sheet.text["dims"]) == [2, 8, 16] and sheet.text["command"] == "pca"  # type: ignore[attr-defined]
    code, _, err = run_cli(*draw, "--dims", 2, 17, "--overwrite")
    assert code == 2 and "17 dimensions are asked for, and this CLIP's embeddings have 16" in err


def test_what_fit_pca_refuses(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    code, _, err = run_cli("fit-pca", "--model", "emoji", "--data", "synthetic")
    assert code == 2 and "'emoji' is not a folder of yours to change; add --out" in err
    code, _, err = run_cli("fit-pca", "--model", tmp_path / "nowhere", "--data", "synthetic")
    assert code == 1 and "no model folder at" in err
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    code, _, err = run_cli(
        "fit-pca", "--model", tiny_bundle, "--data", "synthetic", "--out", other, "--overwrite", "--samples", 4
    )
    assert code == 1 and "config.json is missing" in err and (other / "letter.txt").exists()
    code, _, err = run_cli("fit-pca", "--model", tiny_bundle, "--data", "synthetic", "--samples", 1)
    assert code == 2 and "--samples" in err
