"""The training loop in one process: EMA, schedule, checkpoints, bad input, a killed run continued."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from decoder.config import DecoderRunConfig
from prior.config import PriorRunConfig
from unclip.config import OptimizerConfig, TrainConfig, WandbConfig, parse_config
from unclip.errors import UnclipError, UsageError
from unclip.runs import MEASURED
from unclip.training import Distributed, main_for
from unclip.training.checkpoint import checkpoints, find_checkpoint, save_checkpoint
from unclip.training.clip_config import ClipRunConfig
from unclip.training.ema import EMA
from unclip.training.engine import learning_rate_factor, micro_batch_size
from unclip.training.tracking import Tracker
from upsamplers.config import UpsamplerRunConfig

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


# ---- pieces ------------------------------------------------------------------------------------------------


def test_ema_agrees_with_a_plain_reference() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ema = EMA(network, decay=0.9)
    reference = {name: p.detach().double() for name, p in network.named_parameters()}
    for update in range(120):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))  # reaches 0.9 at update 80
        for name, parameter in network.named_parameters():
            reference[name] = decay * reference[name] + (1 - decay) * parameter.detach().double()
    network[1].running_mean.fill_(3)  # type: ignore[union-attr, operator]
    full = ema.state_dict_full()
    assert set(full) == set(network.state_dict())
    for name, expected in reference.items():
        assert full[name].dtype == torch.float32
        assert torch.allclose(full[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(full["1.running_mean"], torch.full((3,), 3.0))  # buffers are as they are
    live = {name: p.detach().clone() for name, p in network.named_parameters()}
    with ema.applied():
        assert all(torch.equal(p, full[name]) for name, p in network.named_parameters())
    assert all(torch.equal(p, live[name]) for name, p in network.named_parameters())


def test_learning_rate_warms_up_and_decays() -> None:
    cosine = OptimizerConfig(warmup_steps=10, schedule="cosine")
    factors = [learning_rate_factor(cosine, step, 110) for step in range(112)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * min(i, 100) / 100)) for i in range(102)])
    line = OptimizerConfig(schedule="linear", lr=1e-3, min_lr=2.5e-4)
    assert [learning_rate_factor(line, step, 4) for step in range(6)] == pytest.approx(
        [1, 0.8125, 0.625, 0.4375, 0.25, 0.25]
    )
    high = OptimizerConfig(schedule="cosine", lr=1e-3, min_lr=5e-4)
    assert [learning_rate_factor(high, step, 4) for step in (0, 2, 4)] == pytest.approx([1, 0.75, 0.5])
    with pytest.raises(UsageError, match=r"min_lr is 0.01, above lr 0.0001"):
        parse_config(OptimizerConfig, {"min_lr": 0.01})
    constant = OptimizerConfig(warmup_steps=2)
    assert [learning_rate_factor(constant, step, 5) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_batch_is_shared_out_evenly() -> None:
    config = TrainConfig(batch_size=24, accumulation=3)
    assert micro_batch_size(config, Distributed(1, 4, CPU)) == 2
    with pytest.raises(UsageError, match=r"batch_size 24 does not divide over 5 .* 3 .*; use a multiple of 15"):
        micro_batch_size(config, Distributed(0, 5, CPU))


def test_checkpoints_are_rotated(tmp_path: Path) -> None:
    """The newest two stay, and every multiple of ten."""
    one = Distributed(0, 1, CPU)
    (tmp_path / ".tmp-step-00000011").mkdir()  # a kill while writing
    (tmp_path / "step-00000001.txt").touch()
    for step in (2, 10, 9, 11, 20, 21, 22):
        save_checkpoint(tmp_path, step, {"step": torch.tensor(step)}, one, keep=2, keep_every=10)
    kept = [path.name for path in checkpoints(tmp_path)]
    assert kept == ["step-00000010", "step-00000020", "step-00000021", "step-00000022"]
    assert find_checkpoint(tmp_path, one, print) == tmp_path / "step-00000022"
    assert not list(tmp_path.glob(".tmp*"))
    assert find_checkpoint(tmp_path / "none", one, print) is None


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "manifest", "format"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    one = Distributed(0, 1, CPU)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"weights": torch.arange(1000.0)}, one, keep=2)
    newest = tmp_path / "step-00000002"
    file, manifest = newest / "rank-0.pt", newest / "manifest.json"
    body = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "format":
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    else:
        file.write_bytes(body[:500] if damage == "cut" else body[:500] + b"?" + body[501:])
    said: list[str] = []
    assert find_checkpoint(tmp_path, one, said.append) == tmp_path / "step-00000001"
    reason = {
        "cut": f"rank-0.pt has 500 bytes, {len(body)} were written",
        "changed": "rank-0.pt is not what was written",
        "missing": "rank-0.pt: No such file or directory",
        "manifest": "manifest.json cannot be understood",
        "format": "its format is 9, and 1 is the one that is known",
    }[damage]
    assert said == [f"the checkpoint {newest} is damaged ({reason}) and is not used"]
    (tmp_path / "step-00000001" / "rank-0.pt").unlink()
    with pytest.raises(UnclipError, match=r"no checkpoint in .* can be read \(step-00000002: .*; step-00000001: "):
        find_checkpoint(tmp_path, one, said.append)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The limit on a file's size is met in the middle of writing, as the end of a disk is."""
    script = """
import resource, signal, sys
from pathlib import Path
import torch
from unclip.errors import UnclipError
from unclip.training import Distributed
from unclip.training.checkpoint import checkpoints, find_checkpoint, save_checkpoint

folder, one = Path(sys.argv[1]), Distributed(0, 1, torch.device("cpu"))
save_checkpoint(folder, 1, {"weights": torch.zeros(10)}, one, keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    save_checkpoint(folder, 2, {"weights": torch.zeros(1_000_000)}, one, keep=1)
except UnclipError as error:
    print(error)
print([path.name for path in sorted(folder.iterdir())], find_checkpoint(folder, one, print).name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == (
        f"the checkpoint of step 2 in {tmp_path} cannot be written: File too large; {tmp_path / 'step-00000001'} "
        "stays. Mend that and enter the same line again"
    )
    assert second == "['step-00000001'] step-00000001"


def test_metrics_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    config = TrainConfig(steps=9, wandb=WandbConfig(mode="disabled"))
    metrics = {"loss": 0.123456789, "images_per_second": 2.0}
    first = Tracker(tmp_path, config, {}, 0, True)
    for step in range(1, 6):
        first.log(step, metrics)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill while writing
    Tracker(tmp_path, config, {}, 3, False).log(9, metrics)  # other processes keep out
    second = Tracker(tmp_path, config, {}, 3, True)
    second.log(4, {**metrics, "loss": 9.0})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [
        *((step, 0.123457) for step in (1, 2, 3)),
        (4, 9.0),
    ]


@pytest.mark.parametrize("key, mode", [(None, "offline"), ("secret", "online")])
def test_wandb_is_online_when_somebody_is_logged_in(
    key: str | None, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    started: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda *_a, **_o: None, finish=lambda **_o: None)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wandb, "api", SimpleNamespace(api_key=key))
    monkeypatch.setattr(wandb, "init", lambda **options: (started.append(options), run)[1])
    monkeypatch.setenv("WANDB_SILENT", "true")
    Tracker(tmp_path / "a run", TrainConfig(), {"seed": 3}, 0, True).close()
    assert len(started) == 1
    assert (started[0]["mode"], started[0]["name"], started[0]["config"]) == (mode, "a run", {"seed": 3})


def test_a_start_is_quiet(tmp_path: Path) -> None:
    """What the libraries say of their own future is no news to who trains."""
    code = (
        "import prior.conditioning, decoder.text, upsamplers.train, wandb\n"
        "from unclip.training.wandb_run import _stored_key\n"
        "print(_stored_key(wandb))"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
    environment.pop("WANDB_API_KEY", None)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "None"
    assert "deprecated" not in result.stderr


# ---- bad input ---------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip_folder: Path) -> dict[str, Path]:
    """A tiny configuration a stage."""
    train = {"run_dir": str(tmp_path / "run"), "steps": 4, "batch_size": 4, "wandb": {"mode": "disabled"}}
    data = {"source": "synthetic", "image_size": 16, "synthetic": {"size": 20}}
    unet = {"image_size": 16, "model_channels": 8, "channel_mult": [1, 2], "head_channels": 8}
    bodies: dict[str, dict[str, Any]] = {
        "clip": {"model": {"embed_dim": 8, "image_size": 16}},
        "prior": {
            "clip": str(tiny_clip_folder),
            "statistics_batches": 1,
            "model": {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1},
        },
        "decoder": {"clip": str(tiny_clip_folder), "model": {"unet": unet, "context_dim": 8}},
        "upsampler": {
            "model": {"unet": unet, "low_size": 8, "high_size": 16, "steps": 2},
            "data": {**data, "crop_size": 8},
        },
    }
    files = {}
    for stage, body in bodies.items():
        files[stage] = tmp_path / f"{stage}.yaml"
        files[stage].write_text(yaml.safe_dump({"data": data, "train": train, **body}))
    return files


def refused(
    stage: str, recipe: dict[str, Path], capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[int, str]:
    """Exit code and error text of a stage's command, run here."""
    from decoder.train import run as run_decoder
    from prior.train import run as run_prior
    from unclip.training.clip import run as run_clip
    from upsamplers.train import run as run_upsampler

    config_cls, run = {
        "clip": (ClipRunConfig, run_clip),
        "prior": (PriorRunConfig, run_prior),
        "decoder": (DecoderRunConfig, run_decoder),
        "upsampler": (UpsamplerRunConfig, run_upsampler),
    }[stage]
    with pytest.raises(SystemExit) as ended:
        main_for(config_cls, run, "", ["--config", str(recipe[stage]), *overrides])  # type: ignore[arg-type, misc]
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text and isinstance(ended.value.code, int)
    return ended.value.code, text.splitlines()[-1]


STAGES = ["clip", "prior", "decoder", "upsampler"]


def test_script_ends_with_code_2_and_one_line(recipe: dict[str, Path]) -> None:
    command = [sys.executable, "train_prior.py", "--config", str(recipe["prior"]), "train.stepz=3"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # other packages'
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.splitlines() == [
        f"train_prior.py: {recipe['prior']}: unknown key 'train.stepz'; did you mean 'train.steps'?"
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_run_folder_that_cannot_be_written(
    stage: str, recipe: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = recipe[stage] / "run"  # below a file
    code, text = refused(stage, recipe, capsys, f"train.run_dir={place}")
    assert code == 1 and f"the run folder {place} cannot be written" in text


@pytest.mark.parametrize("stage", STAGES)
def test_run_of_another_model_is_not_continued(
    stage: str, recipe: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: {width: 4096}\n")
    code, text = refused(stage, recipe, capsys)
    assert code == 1 and "holds a run of another model" in text and "choose another train.run_dir" in text
    assert (tmp_path / "run" / "config.yaml").read_text() == "model: {width: 4096}\n"


@pytest.mark.parametrize("stage", ["prior", "upsampler"])
def test_data_that_cannot_be_used(
    stage: str, recipe: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, row in (("uncaptioned", {"file_name": "0.png", "colour": "red"}), ("empty", None)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
        (tmp_path / name / "metadata.jsonl").write_text("" if row is None else json.dumps(row) + "\n")
    for name, expected in (
        ("uncaptioned", "has no caption column under a usual name; columns found: image, colour"),
        ("empty", "is empty"),
        ("nowhere", "there is no data set at"),
    ):
        code, text = refused(stage, recipe, capsys, f"data.source={tmp_path / name}")
        assert code == 1 and expected in text and str(tmp_path / name) in text, text
    code, text = refused(stage, recipe, capsys, f"data.source={tmp_path / 'uncaptioned'}", "data.caption_column=x")
    assert code == 1 and "has no column 'x' for the caption" in text


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_clip_that_cannot_be_loaded(stage: str, recipe: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(stage, recipe, capsys, "clip=nothing")[0] == 1
    code, text = refused(stage, recipe, capsys, "train.batch_size=5", "train.accumulation=2")
    assert code == 2 and "use a multiple of 2" in text


def test_missing_configuration_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused("clip", {"clip": Path("nowhere.yaml")}, capsys)
    assert code == 2 and "no configuration file at nowhere.yaml" in text
    with pytest.raises(SystemExit) as ended:
        main_for(ClipRunConfig, lambda *_: None, "", [])
    assert ended.value.code == 2 and "--config" in capsys.readouterr().err


# ---- a run that is killed and continued --------------------------------------------------------------------

STEPS = 40


def start(recipe: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, "train_prior.py", "--config", str(recipe), f"train.run_dir={run_dir}",
        f"train.steps={STEPS}", "train.log_every=1", "train.checkpoint_every=4", "train.ema_decay=0.9",
        "train.optimizer.schedule=cosine",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    return output


def test_a_killed_run_continues_to_the_same_weights(recipe: dict[str, Path], tmp_path: Path) -> None:
    """Bitwise on the CPU: dropout, dropped captions, EMA, a decaying rate, epochs that end in between."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reference, victim = start(recipe["prior"], whole), start(recipe["prior"], cut)
    try:
        while not checkpoints(cut / "checkpoints") and victim.poll() is None:
            time.sleep(0.005)
    finally:
        victim.send_signal(signal.SIGKILL)
    output, _ = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, output
    reached = int(checkpoints(cut / "checkpoints")[-1].name.removeprefix("step-"))
    assert 4 <= reached < STEPS and not (cut / "model").exists()
    finish(reference)
    assert f"continuing {cut} from step {reached}" in finish(start(recipe["prior"], cut))

    def rows(folder: Path) -> list[dict[str, float]]:
        parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in parsed]

    assert rows(whole) == rows(cut) and [row["step"] for row in rows(cut)] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in rows(cut)}) > STEPS / 2
    for name in ("model.safetensors", "config.json"):
        assert (whole / "model" / name).read_bytes() == (cut / "model" / name).read_bytes()
    kept = [path.name for path in checkpoints(cut / "checkpoints")]
    assert kept == [f"step-{STEPS - 4:08d}", f"step-{STEPS:08d}"]


def test_a_run_begun_before_an_option_existed_goes_on(tmp_path: Path) -> None:
    """Its recorded configuration lacks the option, whose default does what was done then."""
    from unclip.training.distributed import current
    from unclip.training.rundir import open_run

    config = parse_config(PriorRunConfig, {"clip": "somewhere", "model": {"width": 32, "heads": 2}})
    body = config.model_dump(mode="json")
    for later in ("kind", "attention_bias", "text_encoder"):
        del body["model"][later]
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(body))
    open_run(run_dir, config, config.train, current())
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == config.model_dump(mode="json")
    changed = parse_config(PriorRunConfig, {"clip": "somewhere", "model": {"width": 64, "heads": 2}})
    with pytest.raises(UnclipError, match="holds a run of another model"):
        open_run(run_dir, changed, changed.train, current())
