"""What the documentation says is so: Python runs, paths, commands and options exist, counts are true."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unclip.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")],
    key=lambda page: str(page.relative_to(ROOT)),
)
RUNNABLE = ["README.md", "docs/python-api.md"]
RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path in the repository, as it is written in running text, tables and shell lines.
_PATH = re.compile(
    r"(?<![\w./<>-])((?:unclip|prior|decoder|upsamplers|configs|examples|docs|tests|\.ci)/[\w./-]*|train_\w+\.py)"
)
_COMMAND = re.compile(r"(?:^|[`\s/])unclip ([a-z]+(?:-[a-z]+)*)((?: [^\n`]*)?)", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _code(page: Path) -> str:
    """Everything on a page that is set as code, line continuations joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [body for language, body in _BLOCK.findall(text) if language in ("bash", "")]
    inline = re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text))
    return "\n".join([*blocks, *inline])


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_python_blocks_run_one_after_another(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "documentation"}
    count = 0
    for match in _BLOCK.finditer(text):
        if match[1] != "python":
            continue
        count += 1
        line = text[: match.start(2)].count("\n")
        exec(compile("\n" * line + match[2], page, "exec"), namespace)
    assert count, f"{page} has no Python block"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in _LINK.findall(text) if "://" not in link}
    missing = sorted(link for link in links - {""} if not (page.parent / link).exists())
    paths = {path.rstrip(".") for path in _PATH.findall(_BLOCK.sub("", text) + _code(page))}
    missing += sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing, f"{_name(page)} names what does not exist"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_and_options_exist(page: Path) -> None:
    import typer

    from unclip.cli.app import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    wrong = []
    for name, rest in _COMMAND.findall(_code(page)):
        if name not in commands:
            wrong.append(f"unclip {name}")
            continue
        known = {option for parameter in commands[name].params for option in parameter.opts}
        known |= {"--help", "--debug"}
        asked = re.findall(r"(?<=\s)(--?[a-z][\w-]*)", rest.partition("#")[0])
        wrong += [f"unclip {name} {option}" for option in asked if option not in known]
    assert not wrong, f"{_name(page)} names what `unclip` does not have"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_figure_is_filled_in(page: Path) -> None:
    assert not re.findall(r"@@[\w:]+@@", page.read_text(encoding="utf-8"))


def test_the_readme_has_its_two_lines_and_ci_runs_the_second() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    one_liners = [line for line in text.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert len(one_liners) == 2
    assert one_liners[0].endswith('.venv/bin/unclip sample --prompt "pizza"')
    marked = re.search(r"<!-- tests:begin -->\n```bash\n(.*)\n```\n<!-- tests:end -->", text)
    assert marked is not None and marked[1] == one_liners[1]
    assert one_liners[1].endswith(".venv/bin/pytest -n auto")
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "pytest" not in script.read_text(encoding="utf-8"), "the line stands in the README alone"


def _build(recipe: Path) -> nn.Module:
    """The network of a configuration, without memory for its weights."""
    stage = recipe.parent.name
    with torch.device("meta"):
        if stage == "clip":
            import open_clip

            from unclip.training.clip_config import ClipRunConfig

            shape = load_config(ClipRunConfig, recipe).model.open_clip_config()
            text = {key: value for key, value in shape["text_cfg"].items() if key != "tokenizer_kwargs"}
            return open_clip.model.CLIP(shape["embed_dim"], shape["vision_cfg"], text)
        if stage == "prior":
            from prior import PriorRunConfig, build_network

            return build_network(load_config(PriorRunConfig, recipe).model)
        if stage == "decoder":
            from decoder import Decoder, DecoderRunConfig

            return Decoder(load_config(DecoderRunConfig, recipe).model)
        from upsamplers import Upsampler, UpsamplerRunConfig

        return Upsampler(load_config(UpsamplerRunConfig, recipe).model)


@pytest.mark.parametrize("recipe", RECIPES, ids=_name)
def test_recipes_parse_and_have_the_size_they_state(recipe: Path) -> None:
    network = _build(recipe)
    comment = " ".join(
        line.lstrip("# ") for line in recipe.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
    )
    stated = re.search(r"([\d,]{5,}) parameters", comment)
    if stated is not None:
        assert sum(p.numel() for p in network.parameters()) == int(stated[1].replace(",", ""))
    if recipe.stem.startswith(("paper", "synthetic", "karlo")) and recipe.parent.name != "upsampler":
        assert stated is not None, "the recipe does not say how large its network is"
