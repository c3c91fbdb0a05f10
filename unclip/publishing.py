"""A bundle, onto the Hub: what is uploaded, and the model card that stands before it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unclip import hub
from unclip.bundle import MANIFEST, read_json, read_manifest, resolve_model
from unclip.describe import describe_model
from unclip.errors import UnclipError, UsageError

CARD = "README.md"
_BESIDE = (MANIFEST, CARD, "LICENSE", "NOTICE")
_SUFFIXES = (".json", ".safetensors", ".gz", ".txt")


def push_to_hub(
    model: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    license: str | None = None,
    data: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    message: str | None = None,
    dry_run: bool = False,
    tell: hub.Tell | None = None,
) -> str:
    """Upload a bundle's parts, manifest and card to the repository 'user/name', in one commit; it is made when it is
    not there. Returns where it lies.

    The card is the bundle's README.md, or `model_card`'s, which `license`, `data`, `datasets` and `metrics` go into.
    `revision` is a branch; `dry_run` tells what would be uploaded and leaves it.
    Raises UsageError: no name of a repository, no licence to tell, metrics that are no numbers. UnclipError: no bundle,
    links out of it, an upload that the Hub refuses.
    """
    named = hub.parse_name(repo)
    if named is None or named.revision is not None:
        raise UsageError(f"{repo!r} is no name of a repository; expected user/name")
    folder = resolve_model(model)
    manifest = read_manifest(folder)
    hub.check_links(folder, list(manifest["parts"].values()))
    files = bundle_files(folder, manifest)
    card = None
    if not (folder / CARD).is_file() or license or data or datasets or metrics:
        card = model_card(folder, license=license, data=data, datasets=datasets, metrics=metrics, repo=repo)
    total = sum(file.stat().st_size for file in files.values())
    told = f"{len(files)} files, {hub.told_size(total)}, to {repo}{f' at {revision}' if revision else ''}"
    (tell or hub.aloud)(f"{'would upload' if dry_run else 'uploading'} {told}")
    if dry_run:
        return f"https://huggingface.co/{repo}"
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, file) for name, file in files.items() if card is None or name != CARD]
    if card is not None:
        operations.append(CommitOperationAdd(CARD, card.encode()))
    try:
        api = hub.client()
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo, operations, commit_message=message or f"Upload {manifest.get('name', folder.name)}", revision=revision
        )
    except Exception as error:  # the Hub's client raises many kinds
        raise UnclipError(f"{repo} could not be written: {hub.answer_of(error)}") from error
    return str(getattr(done, "commit_url", f"https://huggingface.co/{repo}"))


def bundle_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """{name in the repository: file} of what belongs to a bundle; whatever else lies in its folder stays there."""
    files = {name: folder / name for name in _BESIDE if (folder / name).is_file()}
    for inside in manifest["parts"].values():
        for file in sorted((folder / inside).rglob("*")):
            if file.is_file() and file.suffix in _SUFFIXES and not file.name.startswith("."):
                files[str(file.relative_to(folder))] = file
    return files


def model_card(
    model: str | Path,
    *,
    license: str | None = None,
    data: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    repo: str | None = None,
) -> str:
    """The text of a README.md: a front matter that the Hub reads (license, tags, data sets, metrics), the parts, their
    sizes and defaults, and how to draw with it.

    `license` is by default the manifest's; `data` says in words what the model was trained on, `datasets` are Hub ids.
    Raises UsageError: no licence, metrics that are no finite numbers.
    """
    facts = describe_model(model)
    license = license or facts["license"]
    if not license:
        raise UsageError(
            "the model does not tell its licence, and nobody may use it without one; pass license "
            "(--license Apache-2.0)"
        )
    name, drawn_from = facts["name"], "text" if "prior" in facts["parts"] else "image"
    tags = ["unclip", "dall-e-2", "clip", f"{drawn_from}-to-image"]
    front: dict[str, Any] = {
        "license": license.lower(),
        "library_name": "unclip",
        "pipeline_tag": f"{drawn_from}-to-image",
        "tags": tags,
    }
    if datasets:
        front["datasets"] = list(datasets)
    if metrics:
        front["metrics"] = [key.lower() for key in metrics]
        front["model-index"] = [{"name": name, "results": [_result(drawn_from, data, datasets, _finite(metrics))]}]
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {name}", ""]
    sizes = ", ".join(str(size) for size in facts["sizes"])
    lines += [f"An unCLIP (DALL·E 2) model for the package `unclip`; it makes pictures of {sizes} px.", ""]
    lines += ["| part | parameters | size | defaults |", "|---|---:|---:|---|"]
    for part, told in facts["parts"].items():
        defaults = ", ".join(f"{key} {value}" for key, value in told["defaults"].items())
        lines.append(f"| {part} | {told['parameters']:,} | {hub.told_size(told['bytes'])} | {defaults} |")
    lines += ["", "## Training data", "", data or "Not told."]
    lines += [f"- [{one}](https://huggingface.co/datasets/{one})" for one in datasets]
    if metrics:
        lines += ["", "## Metrics", "", "| metric | value |", "|---|---:|"]
        lines += [f"| {key} | {value:g} |" for key, value in metrics.items()]
    asked = (facts["example_prompts"] or ["a red apple"])[0]
    what = f"--prompt {_quoted(asked)}" if drawn_from == "text" else "--image picture.png"
    verb = "sample" if drawn_from == "text" else "variations"
    lines += ["", "## Use", "", "```bash", "pip install unclip", f"unclip {verb} --model {repo or name} {what}", "```"]
    return "\n".join(lines) + "\n"


def read_metrics(file: Path) -> dict[str, float]:
    """A JSON file {"FID": 12.3, …}. UsageError: it holds anything but numbers."""
    return _finite(read_json(file))


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    for name, value in metrics.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) < float("inf"):
            raise UsageError(f"the metric {name!r} is {value!r}; expected a number")
    return {str(name): float(value) for name, value in metrics.items()}


def _result(drawn_from: str, data: str | None, datasets: Sequence[str], metrics: Mapping[str, float]) -> dict[str, Any]:
    dataset = datasets[0] if datasets else "custom"
    return {
        "task": {"type": f"{drawn_from}-to-image"},
        "dataset": {"name": data or dataset, "type": dataset},
        "metrics": [{"type": re.sub(r"\W+", "-", key.lower()), "name": key, "value": v} for key, v in metrics.items()],
    }


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
