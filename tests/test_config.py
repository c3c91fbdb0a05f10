"""Configuration files, overrides, and the sentences about what is wrong with them; the recipes' agreement."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_training import refused_before_loading
from open_clip import get_model_config
from pydantic import ValidationError

from decoder import Decoder, DecoderRunConfig
from prior import Prior, PriorRunConfig
from unclip.bundle import read_json
from unclip.clip import CONFIG_FILE, clip_folder
from unclip.config import Config, DataConfig, DiffusionConfig, TrainConfig, load_config, parse_config
from unclip.errors import UnclipError, UsageError
from unclip.training.clip_config import ClipRunConfig
from upsamplers import UpsamplerRunConfig

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS: dict[str, type[Config]] = {
    "clip": ClipRunConfig,
    "prior": PriorRunConfig,
    "decoder": DecoderRunConfig,
    "upsampler": UpsamplerRunConfig,
}
RECIPES = sorted(CONFIGS.glob("*/*.yaml"))
# Parameters of the bundled model's networks, whose widths come from its CLIP.
BUNDLED = {"prior/emoji": 3_528_960, "decoder/emoji_64": 9_490_528}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def load(tmp_path: Path, text: str = "", *overrides: str) -> ClipRunConfig:
    return load_config(ClipRunConfig, write(tmp_path, text), list(overrides))


# ---- files and overrides -----------------------------------------------------------------------------------


def test_file_overrides_defaults_and_overrides_override_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {steps: 7, seed: 3}\n", "train.steps=9", "--data.source=somewhere")
    assert (config.train.steps, config.train.seed, config.data.source) == (9, 3, "somewhere")
    assert config.train.batch_size == TrainConfig().batch_size
    assert load(tmp_path) == ClipRunConfig()  # an empty file is all defaults


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("train.optimizer.lr=1e-4", "train.optimizer.lr", 1e-4),  # a string to YAML 1.1
        ("train.optimizer.lr=3.0E-5", "train.optimizer.lr", 3e-5),
        ("train.optimizer.betas=[0.9, 0.95]", "train.optimizer.betas", (0.9, 0.95)),
        ("data.cache=true", "data.cache", True),
        ("data.crop_size=null", "data.crop_size", None),
        ("train.wandb.name=run=7", "train.wandb.name", "run=7"),
        ("train.wandb.tags=[a, b]", "train.wandb.tags", ("a", "b")),
        ("data.source=s3://bucket/{00..10}.tar", "data.source", "s3://bucket/{00..10}.tar"),
        ("train.steps=1_000", "train.steps", 1000),
    ],
)
def test_override_values(tmp_path: Path, override: str, path: str, value: Any) -> None:
    found: Any = load(tmp_path, "", override)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("train: {stepz: 3}", [], r"unknown key 'train\.stepz'; did you mean 'train\.steps'\?"),
        ("", ["train.optimizer.learning_rate=1"], r"'train\.optimizer\.learning_rate'; known: betas, eps, "),
        ("modle: {}", [], "unknown key 'modle'; did you mean 'model'"),
        ("data: {synthetic: {sise: 1}}", [], r"did you mean 'data\.synthetic\.size'"),
        ("train: {steps: 0}", [], r"train\.steps: input should be greater than or equal to 1 \(got 0\)"),
        ("train: {zero_stage: 4}", [], r"train\.zero_stage: .*\(got 4\)"),
        ("train: {precision: float16}", [], r"train\.precision: .*'bfloat16'.*\(got 'float16'\)"),
        ("train: {ema_decay: 1}", [], r"train\.ema_decay: input should be less than 1"),
        ("train: {steps: 1.5}", [], r"train\.steps: .*integer"),
        ("train: {optimizer: {lr: .inf}}", [], r"train\.optimizer\.lr: input should be a finite number \(got inf\)"),
        ("train: 3", [], r"train: .*\(got 3\)"),
        ("data: {image_size: 32, crop_size: 64}", [], "crop_size is 64, larger than image_size 32"),
        ("train: {steps: 0, seed: -1}", [], r"train\.steps: .*; train\.seed: "),  # both in one sentence
        ("- 1", [], "holds a list at its top"),
        ("train: [", [], "is not valid YAML"),
        ("", ["train.steps"], "'train.steps' is not of the form key=value"),
        ("", ["=3"], "'=3' is not of the form key=value"),
        (
            "train: {steps: 3}",
            ["train.steps.more=1"],
            "goes below 'steps', which is a value and not a section",
        ),
        ("", ["train.steps=["], "'train.steps=.' has a value that is not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert "run.yaml" in str(caught.value) or "override" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file at .*nowhere\.yaml.*configs/<stage>/"):
        load_config(ClipRunConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="no configuration file"):
        load_config(ClipRunConfig, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_config(ClipRunConfig, tmp_path / "binary.yaml")


def test_long_values_are_shortened() -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(DiffusionConfig, {"schedule": "x" * 1000})
    assert len(str(caught.value)) < 300


def test_configurations_do_not_change() -> None:
    with pytest.raises(ValidationError):
        DataConfig().source = "elsewhere"
    assert issubclass(UsageError, UnclipError) and UnclipError.exit_code == 1


def test_dumped_configuration_reads_back(tmp_path: Path) -> None:
    before = load(tmp_path, "", "data.image_size=72", "data.crop_size=64", "train.wandb.tags=[a]")
    text = yaml.safe_dump(before.model_dump(mode="json"))
    assert load(tmp_path, text) == before


# ---- recipes -----------------------------------------------------------------------------------------------


def name_of(recipe: Path) -> str:
    return f"{recipe.parent.name}/{recipe.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_parses_and_fits_its_clip(recipe: Path) -> None:
    config: Any = load_config(RUNS[recipe.parent.name], recipe)
    if recipe.parent.name not in ("prior", "decoder"):
        return
    widths = widths_of_clip(config)
    stated = config.model.model_fields_set & set(widths)
    assert {name: getattr(config.model, name) for name in stated} == {name: widths[name] for name in stated}
    if name_of(recipe) in BUNDLED:
        assert not stated  # all from the CLIP, when training starts
        model = parse_config(type(config.model), {**config.model.model_dump(), **widths})
        with torch.device("meta"):
            network = Prior(model) if recipe.parent.name == "prior" else Decoder(model)
        assert sum(p.numel() for p in network.parameters()) == BUNDLED[name_of(recipe)]


def widths_of_clip(config: Any) -> dict[str, int]:
    """Of the CLIP that a recipe's `clip` names: where its own recipe leaves it, a bundle's, or one of open_clip's."""
    for recipe in CONFIGS.glob("clip/*.yaml"):
        clip = load_config(ClipRunConfig, recipe)
        if config.clip == f"{clip.train.run_dir}/model":
            shape = clip.model
            return {
                "embedding_dim": shape.embed_dim,
                "token_dim": shape.text.width,
                "text_length": shape.context_length,
            }
    inside = clip_folder(config.clip) / CONFIG_FILE  # of a bundle
    known = read_json(inside)["model_cfg"] if inside.is_file() else get_model_config(config.clip.split("/")[0])
    assert known is not None, f"no recipe in configs/clip leaves its model in {config.clip}"
    text = known["text_cfg"]
    return {
        "embedding_dim": known["embed_dim"],
        "token_dim": text["width"],
        "text_length": text["context_length"],
    }


def test_every_stage_has_recipes() -> None:
    assert {recipe.parent.name for recipe in RECIPES} == set(RUNS)


# ---- light imports -----------------------------------------------------------------------------------------

PACKAGES = ("data", "diffusion", "evaluation", "nn", "planning", "training")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, unclip, unclip.config, unclip.data, unclip.diffusion, unclip.evaluation, unclip.nn;"
        "import unclip.planning, unclip.training, prior, decoder, upsamplers;"
        "print(*sorted(set(sys.modules) & {'torch', 'open_clip', 'deepspeed', 'datasets', 'wandb', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_a_mistyped_configuration_is_told_before_anything_heavy_loads(stage: str) -> None:
    recipe = next((CONFIGS / stage).glob("*.yaml"))
    assert "train.step" in refused_before_loading(stage, "--config", str(recipe), "train.step=3")


def test_every_name_that_a_package_offers_is_there() -> None:
    for name in ("unclip", *(f"unclip.{part}" for part in PACKAGES), "prior", "decoder", "upsamplers"):
        package = importlib.import_module(name)
        assert set(package.__all__) <= set(dir(package)), name
        assert all(hasattr(package, offered) for offered in package.__all__), name


def test_unknown_names_of_the_package() -> None:
    import unclip

    with pytest.raises(AttributeError, match="no attribute 'Unclip'"):
        _ = unclip.Unclip
    assert unclip.FrozenCLIP.__name__ == "FrozenCLIP" and set(unclip.__all__) >= {"FrozenCLIP", "UnCLIP"}
