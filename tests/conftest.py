"""What several test files share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Before torch is imported: processes that test side by side share the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

os.environ["HF_HUB_OFFLINE"] = "1"  # before its client is imported: no test asks the network

TINY_CLIP = {
    "embed_dim": 16,
    "image_size": 16,
    "patch_size": 8,
    "context_length": 12,
    "vocabulary_merges": 400,
    "vision": {"width": 32, "layers": 1, "heads": 2},
    "text": {"width": 24, "layers": 2, "heads": 2},
}


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP in open_clip's local-dir layout, as train_clip.py writes it."""
    return make_clip(tmp_path_factory.mktemp("clip"))


def example(name: str) -> ModuleType:
    """A file below examples/, such as 'editing/imagic', as a module; it is no part of the package."""
    file = Path(__file__).parents[1] / "examples" / f"{name}.py"
    sys.path.insert(0, str(file.parent))  # what it imports from its own folder
    try:
        spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def make_clip(root: Path) -> Path:
    import torch

    from unclip.clip import build_trainable, save_folder, write_vocabulary
    from unclip.config import parse_config
    from unclip.training.clip_config import ClipConfig

    root.mkdir(exist_ok=True)
    model_config = parse_config(ClipConfig, TINY_CLIP).open_clip_config()
    vocabulary = root / model_config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    write_vocabulary(vocabulary, TINY_CLIP["vocabulary_merges"])  # type: ignore[arg-type]
    torch.manual_seed(0)
    model, _ = build_trainable(model_config, root)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    save_folder(root / "model", model_config, state, vocabulary)
    return root / "model"


@pytest.fixture(scope="session")
def tiny_parts(tiny_clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny random CLIP, prior, decoder and two upsamplers that fit together."""
    from helpers_bundle import make_parts

    return make_parts(tmp_path_factory.mktemp("parts"), tiny_clip_folder)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of those parts, 64 to 1024 px; shared, so do not change it."""
    from helpers_bundle import make_bundle

    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny", tiny_parts)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `unclip …` in this process -> (exit code, stdout, stderr)."""
    from unclip.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data of `datasets` in a folder of the module's own."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    patch.undo()
