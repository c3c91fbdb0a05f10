"""The command imports no more than it computes with, and everything can still be imported after it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch

from unclip import lean
from unclip.bundle import resolve_model
from unclip.clip import FrozenCLIP
from unclip.clip_identity import CONFIG_FILE, WEIGHTS_FILE
from unclip.clip_library import is_plain, library_for, library_of
from unclip.nn.embeddings import random_parameter

ROOT = Path(__file__).parents[1]
HEAVY = [
    *("torch._dynamo", "torch._inductor", "sympy", "open_clip", "torchvision", "timm", "transformers"),
    *("huggingface_hub", "einx._src", "wandb", "deepspeed", "datasets", "diffusers", "peft", "matplotlib"),
]

IN_A_PROCESS = """
import json, sys
from unclip.cli import main
sys.argv = ["unclip", "sample", "--prompt", "pizza", "--size", "64", "--out", "pizza.png"]
code = main()
print(json.dumps({"code": code, "heavy": sorted(set(sys.argv_heavy) & set(sys.modules))}))

import torch
from unclip import clip_library
from unclip.clip import FrozenCLIP, build_architecture
light = FrozenCLIP.load("emoji")
own = clip_library.library_of(light.model)

import einx, open_clip, timm, torchvision, transformers
from x_transformers import Encoder
whole = FrozenCLIP.load("emoji")
picture = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
box = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 2)
encoder = Encoder(dim=8, depth=1, heads=1, attn_dim_head=8).eval()
x, mask = torch.linspace(-3, 3, 24).sin().view(1, 3, 8), torch.tensor([[True, True, False]])
tower = {"embed_dim": 8, "vision_cfg": {"timm_model_name": "test_vit", "image_size": 32}}
tower["text_cfg"] = {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 1, "layers": 1}
json.dump({"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
           "intermediate_size": 8, "vocab_size": 64}, open("config.json", "w"))
bert = {"hf_model_name": ".", "hf_tokenizer_name": ".", "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
small = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
words = {"embed_dim": 8, "vision_cfg": small, "text_cfg": bert, "custom_text": True}
with torch.no_grad():
    print(json.dumps({
        "apart": own is not open_clip and not isinstance(light.model, open_clip.CLIP),
        "whole": isinstance(whole.model, open_clip.CLIP) and clip_library.library_of(whole.model) is open_clip,
        "text": torch.equal(light.encode_text(["pizza"]).embedding, whole.encode_text(["pizza"]).embedding),
        "image": torch.equal(light.encode_image(picture), whole.encode_image(picture)),
        "timm": open_clip.timm_model.timm is timm,
        "transformers": open_clip.hf_model.transformers is transformers,
        "nms": torchvision.ops.nms(box, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1],
        "misc": open_clip.utils.FrozenBatchNorm2d is torchvision.ops.misc.FrozenBatchNorm2d,
        "einx": einx.where("a, a, -> a", torch.tensor([True, False]), torch.ones(2), 0.0).tolist() == [1, 0],
        "mask": bool((encoder(x, mask=mask)[0, 2] != encoder(x)[0, 2]).any()),
        "compiled": torch.allclose(torch.compile(encoder, backend="eager")(x), encoder(x)),
        "tower": type(build_architecture(tower).visual.trunk).__module__.split(".")[0] == "timm",
        "bert": type(build_architecture(words).text.transformer).__name__ == "BertModel",
    }))
""".replace("sys.argv_heavy", repr(HEAVY))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`unclip_big`, `unclip_plain` and `unclip_broken`, which count how often they ran; `unclip_kit`, which uses the
    first and may use `unclip_maybe`.
    """
    counts = "import os\nos.environ['RUNS'] = os.environ.get('RUNS', '') + 'x'\n"
    files = {
        "unclip_big/__init__.py": counts + "from .deep import misc\n",
        "unclip_big/deep/__init__.py": "raise RuntimeError('the deep package ran')\n",
        "unclip_big/deep/misc.py": "class Thing:\n    pass\n",
        "unclip_kit/__init__.py": "from .tool import Thing, maybe\nwhole = True\n",
        "unclip_kit/tool.py": (
            "from unclip_big.deep.misc import Thing\n"
            "try:\n    import unclip_maybe as maybe\nexcept ImportError:\n    maybe = None\n"
        ),
        "unclip_maybe.py": "there = True\n",
        "unclip_plain/__init__.py": counts + "value = 3\n",
        "unclip_plain/inner.py": "value = 4\n",
        "unclip_broken.py": counts + "raise ValueError('broken')\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RUNS", "")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("unclip_"):
            del sys.modules[name]


def loaded() -> set[str]:
    return {name for name in sys.modules if name.startswith("unclip_")}


def kit(**more: Any) -> ModuleType:
    with lean.skeleton(("unclip_kit", "unclip_big", "unclip_big.deep"), **more):
        importlib.import_module("unclip_kit.tool")
        return sys.modules["unclip_kit"]


# ---- packages without their __init__ -------------------------------------------------------------------------


def test_a_skeleton_runs_no_init_and_leaves_nothing(packages: Path) -> None:
    module: Any = kit(absent=("unclip_maybe",))
    assert module.tool.maybe is None and not hasattr(module, "whole") and os.environ["RUNS"] == ""
    assert loaded() == set()  # whoever imports one of them now gets it whole
    import unclip_maybe  # type: ignore[import-not-found]

    assert unclip_maybe.there and sys.modules["unclip_maybe"] is unclip_maybe
    (packages / "unclip_big/deep/__init__.py").write_text("")
    import unclip_kit  # type: ignore[import-not-found]

    assert unclip_kit.whole and unclip_kit.maybe is unclip_maybe and os.environ["RUNS"] == "x"
    assert unclip_kit.Thing is not module.tool.Thing


def test_a_skeleton_takes_what_is_loaded_as_it_is(packages: Path) -> None:
    import unclip_maybe

    (packages / "unclip_big/deep/__init__.py").write_text("")
    import unclip_big.deep.misc  # type: ignore[import-not-found]

    module: Any = kit(absent=("unclip_maybe",))
    assert module.tool.maybe is unclip_maybe and module.tool.Thing is unclip_big.deep.misc.Thing
    assert loaded() == {"unclip_maybe", "unclip_big", "unclip_big.deep", "unclip_big.deep.misc"}


def test_a_failure_leaves_nothing_either(packages: Path) -> None:
    with pytest.raises(ImportError, match="no package unclip_nowhere"), lean.skeleton(("unclip_kit", "unclip_nowhere")):
        pass
    with pytest.raises(ImportError), lean.skeleton(("unclip_kit",), absent=("unclip_maybe",)):
        import unclip_maybe  # noqa: F401
    assert loaded() == set()


# ---- deferred modules ----------------------------------------------------------------------------------------


def test_a_deferred_module_runs_when_it_is_asked_for_something(packages: Path) -> None:
    lean.defer("unclip_plain")
    import unclip_plain  # type: ignore[import-not-found]
    import unclip_plain.inner as inner  # type: ignore[import-not-found]

    assert os.environ["RUNS"] == "" and inner.value == 4
    assert unclip_plain.value == 3 and os.environ["RUNS"] == "x"
    from unclip_plain import value

    assert value == 3 and type(unclip_plain) is ModuleType and unclip_plain.inner is inner and os.environ["RUNS"] == "x"
    with pytest.raises(AttributeError, match="nothing"):
        _ = unclip_plain.nothing
    lean.defer("unclip_plain")  # it is imported already
    assert sys.modules["unclip_plain"] is unclip_plain


def test_a_deferred_module_may_be_missing_or_broken(packages: Path) -> None:
    lean.defer("unclip_nowhere")
    assert "unclip_nowhere" not in sys.modules
    lean.defer("unclip_broken")
    import unclip_broken  # type: ignore[import-not-found]

    for runs in ("x", "xx"):
        with pytest.raises(ValueError, match="broken"):
            _ = unclip_broken.value
        assert os.environ["RUNS"] == runs


# ---- which CLIP needs how much -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, plain",
    [
        ({}, True),
        ({"vision_cfg": {"timm_model_name": "vit"}}, False),
        ({"text_cfg": {"hf_model_name": "roberta"}}, False),
        ({"text_cfg": {"hf_tokenizer_name": "t5"}}, False),
        ({"multimodal_cfg": {}}, False),
        ({"vision_cfg": None}, False),
    ],
)
def test_a_clip_of_open_clips_own_towers_is_plain(tmp_path: Path, change: dict[str, Any], plain: bool) -> None:
    assert not is_plain(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"")
    (tmp_path / CONFIG_FILE).write_text("{")
    assert not is_plain(tmp_path)
    config = {"embed_dim": 8, "vision_cfg": {"width": 8}, "text_cfg": {"width": 8}, **change}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": config}))
    assert is_plain(tmp_path) is plain


def test_a_process_that_is_not_the_commands_gets_the_whole_open_clip() -> None:
    assert not lean.is_own()
    clip = FrozenCLIP.load("emoji")
    assert isinstance(clip.model, open_clip.CLIP)
    assert library_of(clip.model) is library_for(resolve_model("emoji") / "clip") is open_clip


def test_random_parameters_are_randn_and_empty_on_the_meta_device() -> None:
    torch.manual_seed(3)
    first = random_parameter(4, 5, std=0.02)
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(4, 5) * 0.02) and first.requires_grad
    with torch.device("meta"):
        assert random_parameter(4, 5).is_meta


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_imports_little_and_the_rest_can_be_imported_after_it(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    first, then = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert first == {"code": 0, "heavy": []} and (tmp_path / "pizza.png").is_file()
    assert [name for name, right in then.items() if not right] == []
