"""From `train` to DeepSpeed's JSON, a JSON of the user's own, and the launcher's command over several machines."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unclip.config import TrainConfig, load_config, parse_config
from unclip.errors import UsageError
from unclip.training import main_for
from unclip.training.clip_config import ClipRunConfig
from unclip.training.settings import deepspeed_config, settle

ROOT = Path(__file__).parents[1]
BODY: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.96], "weight_decay": "auto"}},
    "wall_clock_breakdown": True,
}


def written(tmp_path: Path, body: Any) -> str:
    file = tmp_path / "deepspeed.json"
    file.write_text(body if isinstance(body, str) else json.dumps(body))
    return str(file)


def test_json_is_derived_from_the_configuration() -> None:
    config = TrainConfig(batch_size=24, accumulation=3)
    body = deepspeed_config(config, 4)
    assert body["train_micro_batch_size_per_gpu"] == 2 and body["gradient_accumulation_steps"] == 3
    assert body["zero_optimization"] == {"stage": 0} and body["gradient_clipping"] == 0  # the loop clips
    config = parse_config(
        TrainConfig, {"zero_stage": 3, "offload": {"optimizer": "nvme", "nvme_path": "/x", "parameters": "cpu"}}
    )
    assert settle(config, 1) is config
    assert deepspeed_config(config, 1)["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/x"},
        "offload_param": {"device": "cpu"},
    }
    assert deepspeed_config(config, 1)["gradient_clipping"] == 1.0


def test_a_whole_json_says_what_the_configuration_leaves_open(tmp_path: Path) -> None:
    config = parse_config(TrainConfig, {"deepspeed": written(tmp_path, BODY), "steps": 7})
    settled = settle(config, 3)
    assert (settled.batch_size, settled.accumulation, settled.zero_stage, settled.steps) == (24, 2, 2, 7)
    options = settled.optimizer
    assert (options.lr, options.betas, options.weight_decay, options.grad_clip) == (2e-4, (0.9, 0.96), 0.0, 0.5)
    assert settled.offload.optimizer == "cpu"
    used = deepspeed_config(settled, 3)
    assert used["zero_optimization"] == BODY["zero_optimization"] and used["wall_clock_breakdown"] is True
    assert used["train_micro_batch_size_per_gpu"] == 4 and "optimizer" not in used
    assert settle(settled, 3).model_dump() == settled.model_dump()


def test_what_both_say_otherwise_is_named(tmp_path: Path) -> None:
    body = {"deepspeed": written(tmp_path, BODY), "batch_size": 32, "zero_stage": 1, "accumulation": 2}
    body |= {"optimizer": {"grad_clip": 1.0, "lr": 2e-4, "betas": [0.9, 0.999]}}
    with pytest.raises(UsageError) as error:
        settle(parse_config(TrainConfig, body), 2)
    assert str(error.value) == (
        f"{tmp_path / 'deepspeed.json'} and the configuration disagree: zero_optimization.stage 2 there and "
        "train.zero_stage 1 here; gradient_clipping 0.5 there and train.optimizer.grad_clip 1 here; "
        "optimizer.params.betas [0.9, 0.96] there and train.optimizer.betas [0.9, 0.999] here; "
        "train_micro_batch_size_per_gpu 4, a batch of 16 there and train.batch_size 32 here; say each in one place"
    )


@pytest.mark.parametrize(
    "body, expected",
    [
        ("{", "is not JSON"),
        ([1], "holds a list at its top"),
        ({"scheduler": {"type": "WarmupLR"}}, "section 'scheduler'.*train.optimizer.schedule"),
        ({"bf16": {"enabled": True}}, "section 'bf16'.*train.precision: bfloat16"),
        ({"optimizer": {"type": "OneBitAdam"}}, "asks for the optimizer 'OneBitAdam'; AdamW is the one"),
        ({"optimizer": {"params": {"momentum": 1}}}, "an unknown parameter 'momentum'"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "hpZ.*cannot be resumed"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "use cpu"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "needs train.zero_stage 1, 2 or 3"),
        ({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2}, "says train_batch_size 9, but .* makes 4 on 2"),
        ({"zero_optimization": {"stage": 7}}, "zero_stage"),
    ],
)
def test_a_json_that_cannot_be_used(tmp_path: Path, body: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        settle(TrainConfig(deepspeed=written(tmp_path, body)), 2)


@pytest.mark.parametrize(
    "body, expected",
    [
        ({"offload": {"optimizer": "cpu"}}, "offload.optimizer needs train.zero_stage 1, 2 or 3, and it is 0"),
        ({"offload": {"optimizer": "nvme"}, "zero_stage": 2}, "nvme needs train.zero_stage 3, and it is 2"),
        ({"offload": {"parameters": "cpu"}, "zero_stage": 2}, "parameters needs train.zero_stage 3, and it is 2"),
        ({"offload": {"optimizer": "nvme"}, "zero_stage": 3}, "nvme needs train.offload.nvme_path"),
        ({"deepspeed": "nowhere.json"}, "train.deepspeed is nowhere.json, and there is no such file"),
    ],
)
def test_settings_that_do_not_go_together(body: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        settle(parse_config(TrainConfig, body), 1)


def test_the_json_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"train": {"zero_stage": 2, "batch_size": 6}}))
    main_for(ClipRunConfig, lambda *_: pytest.fail("it ran"), "", ["--config", str(recipe), "--print-deepspeed"])
    assert json.loads(capsys.readouterr().out) == deepspeed_config(TrainConfig(zero_stage=2, batch_size=6), 1)


def test_optimizers_of_the_paper() -> None:
    """unCLIP's Table 3: each stage's β2 and ε."""
    from decoder.config import DecoderRunConfig
    from prior.config import PriorRunConfig
    from upsamplers.config import UpsamplerRunConfig

    expected: dict[str, tuple[Any, float, float, float, float]] = {
        "prior/paper": (PriorRunConfig, 1.1e-4, 6e-2, 0.96, 1e-6),
        "prior/paper_autoregressive": (PriorRunConfig, 1.6e-4, 4e-2, 0.91, 1e-10),
        "decoder/paper_64": (DecoderRunConfig, 1.2e-4, 0, 0.999, 1e-8),
        "upsampler/paper_64_to_256": (UpsamplerRunConfig, 1.2e-4, 0, 0.999, 1e-8),
        "upsampler/paper_256_to_1024": (UpsamplerRunConfig, 1.0e-4, 0, 0.999, 1e-8),
    }
    for recipe, (cls, lr, decay, beta2, eps) in expected.items():
        options = load_config(cls, ROOT / "configs" / f"{recipe}.yaml").train.optimizer
        assert (options.lr, options.weight_decay, options.betas, options.eps) == (lr, decay, (0.9, beta2), eps), recipe


@pytest.mark.launcher
def test_several_machines(tmp_path: Path) -> None:
    """A dry run: a `pdsh` that writes down what it was told to start, and where."""
    told = tmp_path / "told"
    (tmp_path / "pdsh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n')
    (tmp_path / "pdsh").chmod(0o755)
    (tmp_path / "hosts").write_text("node-a slots=8\nnode-b slots=4\n")
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--hostfile", tmp_path / "hosts", "--launcher", "pdsh", "--no_ssh_check"]
    command += ["--master_addr", "node-a", "--master_port", "29701", "train_decoder.py"]
    done = subprocess.run(
        [*map(str, command), "--config", "configs/decoder/paper_64.yaml", "train.batch_size=24"],
        cwd=ROOT, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    words = told.read_text().split()
    assert words[words.index("-w") + 1] == "node-a,node-b"
    (world,) = [word for word in words if word.startswith("--world_info=")]
    slots = json.loads(base64.urlsafe_b64decode(world.partition("=")[2]))
    assert slots == {"node-a": list(range(8)), "node-b": list(range(4))}
    assert "--master_addr=node-a" in words and "--master_port=29701" in words
    script = words.index("train_decoder.py")
    assert [w.strip("'") for w in words[script : script + 4]] == [
        "train_decoder.py", "--config", "configs/decoder/paper_64.yaml", "train.batch_size=24",
    ]  # fmt: skip
