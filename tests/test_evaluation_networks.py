"""Networks of local files, the command's refusals, and what evaluations stand on in the rooms below."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_evaluation import SIZE, data, extractor, write_folder

from unclip.config import DiffusionConfig
from unclip.diffusion import GaussianDiffusion, Prediction
from unclip.diffusion.samplers import SeededNoise, ddpm, ddpm_large, get_sampler
from unclip.errors import UnclipError, UsageError
from unclip.evaluation.features import INCEPTION_FILE, Inception, Lpips, lpips_file
from unclip.pipeline import UnCLIP

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache of weights, empty."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"  # type: ignore[misc]
    torch.hub.set_dir(before)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception's file, with random weights in all of its shapes."""
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        random = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "mine.pth"
    torch.save(random.state_dict(), file)
    return file


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)


def test_inception_is_torchmetrics(hub: Path, inception_file: Path) -> None:
    """With random weights in torch's cache, so that nothing is downloaded."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    with pytest.raises(UnclipError, match=rf"no Inception weights at .*{INCEPTION_FILE}; name the file .* --inception"):
        Inception()
    hub.mkdir(parents=True)
    file = hub / INCEPTION_FILE
    shutil.copy(inception_file, file)
    network = Inception()
    found = network(pictures(2))
    assert found["features"].shape == (2, 2048) and found["logits"].shape == (2, 1008)
    own = NoTrainInceptionV3("own", ["2048"], feature_extractor_weights_path=str(file))(pictures(2))
    assert torch.allclose(torch.from_numpy(found["features"]), own.reshape(2, -1), rtol=1e-5, atol=1e-6)
    assert Inception(file).identity == network.identity


def test_lpips_is_torchmetrics(hub: Path, tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
    from torchvision.models import squeezenet1_1

    assert Lpips.find(None) is None  # no AlexNet in the cache: the diversity is CLIP's
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "mine.pth")
    network = Lpips(tmp_path / "mine.pth")
    assert network.net == "squeeze" and torch.hub.get_dir() == str(hub.parent)
    images = pictures(3).float() / 127.5 - 1
    hub.mkdir(parents=True)
    torch.save(squeezenet1_1(weights=None).state_dict(), lpips_file("squeeze"))
    (tmp_path / "mine.pth").replace(lpips_file("squeeze"))
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = [
        float(learned_perceptual_image_patch_similarity(images[i : i + 1], images[j : j + 1], net_type="squeeze"))
        for i, j in pairs
    ]
    assert network.diversity(images) == pytest.approx(sum(wanted) / 3, rel=1e-4)
    assert network.diversity(images[:1].expand(2, -1, -1, -1)) == pytest.approx(0, abs=1e-6)


class _Runs:
    """What a pickle can do when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_weights_of_something_else(hub: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UnclipError, match=rf"other\.pth does not hold the weights of {INCEPTION_FILE}"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(UnclipError, match="holds no weights of torchvision's AlexNet, VGG16 or SqueezeNet"):
        Lpips(tmp_path / "other.pth")
    with pytest.raises(UnclipError, match=r"no weights for LPIPS at .*; name torchvision's file of AlexNet"):
        Lpips(tmp_path / "none.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Runs(tmp_path / "was-run")))
    for load in (Inception, Lpips):
        with pytest.raises(UnclipError, match="cannot be read as"):
            load(tmp_path / "evil.pth")
    assert not (tmp_path / "was-run").exists()


def test_names_follow_from_the_network(tiny_bundle: Path) -> None:
    """Only Inception's figures are called FID and KID; CLIP's features are of unit length times √E."""
    network = extractor(tiny_bundle, small=True)
    found = network(pictures(3))
    assert (network.names.frechet, network.names.kernel) == ("FD-CLIP", "KD-CLIP")
    assert "not comparable with FIDs" in network.names.note()
    assert torch.allclose(network.compared(found).norm(dim=1), torch.full((3,), 16**0.5))
    assert found["small"].shape == (3, 3, 32, 32)
    network.inception = object()  # type: ignore[assignment]
    assert (network.names.frechet, network.names.kernel) == ("FID", "KID")


def test_the_larger_variance_is_that_of_a_process_that_has_it() -> None:
    """σ̂ of DDIM, whatever the network says of the variance."""

    def denoiser_of(process: GaussianDiffusion) -> Any:
        return lambda x, t: process.to_prediction(0.3 * x, x, t)

    small, large = (GaussianDiffusion(DiffusionConfig(variance=kind)) for kind in ("fixed_small", "fixed_large"))
    steps, x = small.steps([0, 300, 700, 999]), torch.randn(2, 3, 4, 4)
    wanted = ddpm(denoiser_of(large), x, steps, SeededNoise([0, 1]))
    assert torch.equal(ddpm_large(denoiser_of(small), x, steps, SeededNoise([0, 1])), wanted)
    assert not torch.equal(ddpm(denoiser_of(small), x, steps, SeededNoise([0, 1])), wanted)
    assert get_sampler(ddpm_large) is ddpm_large

    def learned(x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        return denoiser_of(small)(x_t, t)._replace(variance_fraction=torch.zeros_like(x_t))  # type: ignore[no-any-return]

    assert torch.equal(ddpm_large(learned, x, steps, SeededNoise([0, 1])), wanted)


def test_conditioned_pictures(tiny_bundle: Path) -> None:
    """By the prior they are those of `sample`; each way those of `compare_conditioning`, whatever the batch."""
    model = UnCLIP.from_pretrained(tiny_bundle, size=SIZE)
    both = model.draw_conditioned(["pizza", "rainbow"], seed=[3, 4], size=SIZE)
    assert torch.allclose(both, model.sample(["pizza", "rainbow"], seed=[3, 4], size=SIZE, output="tensor"))
    drawn = model.compare_conditioning("pizza", num_images=1, seed=3, size=SIZE)
    for way, images in drawn.items():
        (one,) = model.draw_conditioned("pizza", way, seed=3, size=SIZE)  # type: ignore[arg-type]
        assert model._finish(one[None], "pil")[0].tobytes() == images[0].tobytes()
    with pytest.raises(UsageError, match="unknown conditioning 'none'; possible: caption, text embedding, prior"):
        model.draw_conditioned("pizza", "none")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "set", 12)


def test_weights_of_local_files_give_the_figures_their_names(
    run_cli: Run, tiny_bundle: Path, folder: Path, inception_file: Path, tmp_path: Path, hub: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """FID, KID, Inception Score and LPIPS from files of random weights, through the command and into the report."""
    from torchvision.models import squeezenet1_1

    from unclip.evaluation import metrics

    seen: list[torch.Size] = []

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        seen.append(one["sigma"].shape)  # the root of 2048 × 2048 values takes many seconds
        return float((one["mu"] - other["mu"]).square().sum())

    monkeypatch.setattr(metrics, "frechet_of", distance)
    common = ["--data", folder, "--model", tiny_bundle, "--size", SIZE, "--cache", tmp_path / "c", "--json"]
    code, out, err = run_cli(
        "eval", *common, "--pictures", folder, "--prompts", 4, "--real", 6, "--features", "inception", "--inception",
        inception_file, "--out", tmp_path / "out", "--metrics", "frechet", "kernel", "inception",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)["figures"]
    assert [one["label"] for one in found.values()] == ["FID", "KID", "Inception Score"]
    assert set(seen) == {torch.Size([2048, 2048])} and "CLIP" not in found["frechet"]["note"]
    network = Inception(inception_file)
    real, drawn = (network(one.pixels(one.first(6), SIZE)[1]) for one in (data(folder, 6), data(folder, 4)))
    gap = drawn["features"].mean(0) - real["features"].mean(0)
    assert found["frechet"]["value"] == pytest.approx(float((gap**2).sum()), rel=1e-4)
    torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    code, out, err = run_cli(
        "eval", *common, "--prompts", 2, "-n", 2, "--metrics", "diversity", "--lpips", tmp_path / "squeeze.pth",
        "--out", tmp_path / "lpips",
    )  # fmt: skip
    assert code == 0, err
    diversity = json.loads(out)["figures"]["diversity"]
    assert "LPIPS (squeeze)" in diversity["note"] and diversity["value"] > 0


def test_the_commands(run_cli: Run, tiny_bundle: Path, folder: Path, tmp_path: Path, hub: Path) -> None:
    common = ["--data", folder, "--model", tiny_bundle, "--size", SIZE, "--cache", tmp_path / "c", "--prompts", 6]
    code, out, err = run_cli("memorisation", *common, "--set", "holdout=0.4", "--out", tmp_path / "memory", "-q")
    assert code == 0, err
    assert "Closer than the baseline's 1st percentile" in out and out.endswith("report.html\n")
    assert (tmp_path / "memory" / "closest.png").is_file()
    code, out, err = run_cli("memorisation", *common, "--out", tmp_path / "alone", "-q")  # nothing was held out
    assert code == 0, err
    assert "training pictures among themselves" in (tmp_path / "alone" / "report.md").read_text()
    code, out, err = run_cli("sweep", "guidance", *common, "--scales", 1, 2, "--out", tmp_path / "sweep")
    assert code == 0, err
    assert (tmp_path / "sweep" / "sweep.png").is_file()
    wrong: list[tuple[list[Any], int, str]] = [
        (["eval", *common, "--metrics", "fid"], 2, "unknown metric 'fid'; known: frechet, kernel"),
        (["eval", *common, "--features", "inception"], 1, "there are no Inception weights at"),
        (["eval", *common, "--inception", "x.pth"], 2, "add --features inception"),
        (["eval", *common, "--lpips", "x.pth", "-n", 2], 1, "no weights for LPIPS at x.pth"),
        (["eval", *common, "--guidance", 2, "--pictures", folder], 2, "guidance is of what the model draws"),
        (["eval", *common, "-n", 2, "--pictures", folder], 2, "with --pictures each picture counts once"),
        (["eval", *common, "--out", tmp_path / "sweep"], 1, "was begun with"),
        (["eval", "--data", tmp_path / "none", "--model", tiny_bundle], 1, "there is no data set at"),
        (["sweep", "guidance", *common, "--steps", 5], 2, "--steps is of `unclip sweep steps`"),
        (["sweep", "prior", *common, "--scales", 5], 2, "--scales is of `unclip sweep guidance`"),
        (["sweep", "steps", *common, "--etas", "-1"], 2, "the eta -1.0 is unknown"),
        (["sweep", "colours", *common], 2, "colours"),
        (["memorisation", *common, "--held-out", tmp_path / "none"], 1, "there is no data set at"),
        (["memorisation", *common, "--features", "inception"], 2, "by CLIP's features and pixels"),
    ]
    for arguments, wanted, sentence in wrong:
        given = arguments if "--out" in arguments else [*arguments, "--out", tmp_path / "new"]
        code, out, err = run_cli(*given)
        assert (code, out) == (wanted, ""), (arguments, err)
        assert sentence in err and err.count("\n") == 1, err
        assert not (tmp_path / "new").exists(), arguments


