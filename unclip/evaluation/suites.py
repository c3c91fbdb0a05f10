"""Prompt suites: prompts by what they try, drawn as a sheet a category, and checked where the truth can be known.

A suite is a YAML file (unclip/evaluation/prompts holds those that come along). How pictures are checked is the
suite's: `scenes` finds out what drawn shapes a picture shows, `identity` which picture of a data set it is nearest to,
`none` leaves it to whoever looks at the sheets, beside the CLIP's cosine of prompt and picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator

from unclip.config import Config, load_config
from unclip.errors import UsageError, nearest
from unclip.evaluation import scenes
from unclip.evaluation.bootstrap import mean_interval, wilson
from unclip.evaluation.report import Figure, Report, Section, made_with
from unclip.evaluation.trained import Trained

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from unclip.pipeline import UnCLIP

FOLDER = Path(__file__).parent / "prompts"
RIGHT = "right"
MET, NEW = "combination trained on", "combination never trained on"
ONE = "all of one object"
_COLUMNS = 6


class Prompt(Config):
    """A prompt; `target`: what of the data set the picture must be nearest to, by one of its captions."""

    prompt: str = Field(min_length=1)
    target: str | None = Field(None, description="identity: a caption of the wanted picture; by default the prompt")


class Category(Config):
    """Prompts that try one thing."""

    about: str = ""
    prompts: tuple[Prompt, ...] = Field(min_length=1)

    @field_validator("prompts", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"prompt": one} if isinstance(one, str) else one for one in value]


class Suite(Config):
    """Categories of prompts, and how their pictures are checked."""

    title: str
    about: str = ""
    check: Literal["none", "scenes", "identity"] = "none"
    categories: dict[str, Category] = Field(min_length=1)

    @property
    def prompts(self) -> list[str]:
        return [one.prompt for category in self.categories.values() for one in category.prompts]


class Checker(Protocol):
    """Says of a picture what of its prompt holds, by name; RIGHT is the whole."""

    @property
    def aspects(self) -> tuple[str, ...]: ...

    def __call__(self, asked: Prompt, pictures: Tensor) -> list[dict[str, bool]]: ...


def names() -> list[str]:
    """The suites that come along."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """A suite that comes along by its name, or a YAML file. UsageError: neither, or not of this form."""
    known = names()
    if name in known:
        return load_config(Suite, FOLDER / f"{name}.yaml")
    if not Path(name).is_file():
        raise UsageError(f"no suite {name!r}: it is no file, and those that come along are {', '.join(known)}")
    return load_config(Suite, name)


def chosen(suite: Suite, categories: Sequence[str]) -> Suite:
    """The suite with these categories alone; all of them where none is named. UsageError: one that it has not."""
    for name in categories:
        if name not in suite.categories:
            raise UsageError(f"the suite has no category {name!r}; {nearest(name, suite.categories)}")
    kept = {name: one for name, one in suite.categories.items() if not categories or name in categories}
    return suite.model_copy(update={"categories": kept})


class SceneCheck:
    """The check of drawn shapes (unclip.evaluation.scenes)."""

    aspects = (RIGHT, *scenes.ASPECTS)

    def __init__(self, suite: Suite) -> None:
        for prompt in suite.prompts:  # before anything is drawn
            scenes.parse(prompt)

    def __call__(self, asked: Prompt, pictures: Tensor) -> list[dict[str, bool]]:
        verdicts = [scenes.check(asked.prompt, pixels(one)) for one in pictures]
        return [{aspect: getattr(verdict, aspect) for aspect in self.aspects} for verdict in verdicts]


def pixels(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> uint8 (H, W, 3)."""
    return ((picture.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Result:
    """What a prompt got: K pictures (K, 3, S, S) in [-1, 1], their cosines with it, and what the check found."""

    category: str
    prompt: str
    pictures: Tensor
    cosines: tuple[float, ...]
    checks: tuple[dict[str, bool], ...] = ()


def run(
    system: UnCLIP,
    suite: Suite,
    checker: Checker | None = None,
    *,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    options: Mapping[str, Any] | None = None,
    told: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Result]:
    """Draw every prompt `num_images` times, picture k with seed + k, and check the pictures. `told` hears how many are
    done of how many.
    """
    asked = [(name, one) for name, category in suite.categories.items() for one in category.prompts]
    jobs = [(index, k) for index in range(len(asked)) for k in range(num_images)]
    drawn: list[Tensor] = []
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        texts = [asked[index][1].prompt for index, _ in part]
        drawn.append(system.sample(texts, seed=[seed + k for _, k in part], output="tensor", **(options or {})).cpu())
        told(min(start + batch_size, len(jobs)), len(jobs))
    pictures = torch.cat(drawn)
    results = []
    for index, (category, one) in enumerate(asked):
        own = pictures[index * num_images : (index + 1) * num_images]
        cosines = tuple(system.clip_scores(own, one.prompt).tolist())
        checks = () if checker is None else tuple(checker(one, own))
        results.append(Result(category, one.prompt, own, cosines, checks))
    return results


def summarise(
    suite: Suite,
    results: Sequence[Result],
    aspects: Sequence[str] = (),
    trained: Trained | None = None,
    about: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> Report:
    """The report: a row a category and one of all, shares with Wilson's 95 % intervals, and a sheet a category.

    `trained`: what of drawn shapes was trained on; prompts whose combinations were met and others are then told apart,
    over all and by category.
    """
    groups: dict[str, list[Result]] = {name: [r for r in results if r.category == name] for name in suite.categories}
    every = {"all": list(results)} if len(groups) > 1 else {}
    if trained is not None:
        every |= {
            MET: [one for one in results if trained.knows(one.prompt)],
            NEW: [one for one in results if not trained.knows(one.prompt)],
            "caption trained on": [one for one in results if one.prompt in trained.captions],
        }
    told = {name: _group(found, aspects) for name, found in {**groups, **every}.items() if found}
    head = ["category", "prompts", "pictures", *(aspects or ()), "CLIP cosine"]
    rows = [
        [name, one["prompts"], one["pictures"], *(f"{one[a]['value']:.0%}" for a in aspects), _cosine(one)]
        for name, one in told.items()
    ]
    pictures = len(results[0].pictures) if results else 0
    described = {"suite": suite.title, "prompts": len(results), "pictures of each": pictures, **(about or {})}
    report = Report(suite.title, described | made_with(device or torch.device("cpu")))
    if aspects:
        report.figures = [
            Figure(
                f"{RIGHT}.{name}", f"{name}: right", one[RIGHT]["value"], "higher",
                note=f"{one[RIGHT]['low']:.1%} to {one[RIGHT]['high']:.1%}",
            )
            for name, one in told.items()
        ]  # fmt: skip
    report.sections.append(Section("By category", suite.about, (head, rows)))
    met = {} if trained is None or not aspects else _by_training(groups, trained)
    if met:
        report.sections.append(_training_section(met))
    for name, category in suite.categories.items():
        found = sheet(groups[name])
        alt = f"The pictures of {len(groups[name])} prompts, each below its prompt; report.json holds what was found."
        report.sections.append(Section(name, category.about, picture=(f"sheet-{file_name(name)}", found), alt=alt))
    report.values = {
        "categories": told,
        **({"by_training": met} if met else {}),
        "prompts": [
            {"category": one.category, "prompt": one.prompt, "cosines": one.cosines, "checks": one.checks}
            | ({} if trained is None else {"met": trained.knows(one.prompt)})
            for one in results
        ],
    }
    return report


def _by_training(groups: Mapping[str, Sequence[Result]], trained: Trained) -> dict[str, dict[str, Any]]:
    """Of each category, and of all prompts with one object, the share that is right of prompts whose combinations were
    trained on, and of the others.
    """
    single = [one for results in groups.values() for one in results if len(scenes.parse(one.prompt).things) == 1]
    found: dict[str, dict[str, Any]] = {}
    for name, results in {**groups, ONE: single}.items():
        for kind, met in ((MET, True), (NEW, False)):
            own = [one for one in results if trained.knows(one.prompt) == met]
            checks = [one for result in own for one in result.checks]
            if checks:
                share = wilson(sum(one[RIGHT] for one in checks), len(checks))
                each = [holds for one in checks for aspect, holds in one.items() if aspect != RIGHT]
                found.setdefault(name, {})[kind] = {
                    "prompts": len(own), "pictures": len(checks), **vars(share), "statements": sum(each) / len(each),
                }  # fmt: skip
    return found


def _training_section(met: Mapping[str, Mapping[str, Any]]) -> Section:
    def cells(one: Mapping[str, Any] | None) -> list[Any]:
        if one is None:
            return [0, "", ""]
        share = f"{one['value']:.0%} ({one['low']:.0%}–{one['high']:.0%})"
        return [one["prompts"], share, f"{one['statements']:.0%}"]

    rows = [[name, *cells(kinds.get(MET)), *cells(kinds.get(NEW))] for name, kinds in met.items()]
    text = (
        "A combination is an object's size, colour, shape and place, whatever the background; a prompt counts as "
        "trained on where all of its objects do. Right is a picture in which everything is; statements count each."
    )
    head = ["category", "trained on", "right", "statements", "never", "right", "statements"]
    return Section("By what was trained on", text, (head, rows))


def _group(results: Sequence[Result], aspects: Sequence[str]) -> dict[str, Any]:
    checks = [one for result in results for one in result.checks]
    cosines = [value for result in results for value in result.cosines]
    told: dict[str, Any] = {"prompts": len(results), "pictures": len(cosines), "cosine": vars(mean_interval(cosines))}
    return told | {a: vars(wilson(sum(one[a] for one in checks), len(checks))) for a in aspects}


def _cosine(one: Mapping[str, Any]) -> str:
    found = one["cosine"]
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "category"


def sheet(results: Sequence[Result], columns: int = _COLUMNS) -> Image:
    """Prompts side by side, `columns` a row, with their pictures above each other and what the check found below."""
    from PIL import Image as Images

    from unclip.training.previews import captioned_grid

    strips = []
    for start in range(0, len(results), columns):
        part = results[start : start + columns]
        rows = [torch.stack([one.pictures[k] for one in part]) for k in range(len(part[0].pictures))]
        strips.append(captioned_grid(rows, [_caption(one) for one in part]))
    width, gap = max(strip.width for strip in strips), 8
    whole = Images.new("RGB", (width, sum(strip.height + gap for strip in strips) - gap), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height + gap
    return whole


def _caption(result: Result) -> str:
    if not result.checks:
        return result.prompt
    wrong = sorted({name for one in result.checks for name, ok in one.items() if not ok and name != RIGHT})
    if len(result.checks) == 1:
        mark = "RIGHT" if result.checks[0][RIGHT] else f"WRONG {', '.join(wrong)}"
    else:
        mark = f"{sum(one[RIGHT] for one in result.checks)} of {len(result.checks)} right"
    return f"{mark}: {result.prompt}"
