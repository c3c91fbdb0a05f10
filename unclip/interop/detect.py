"""Which layout a folder of somebody else's weights has: a table of recognisers, and what is said of a folder that none
of them knows.

A row tells what it found and what it misses; the folder is converted by the first row that misses nothing. A new format
is a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unclip.bundle import MANIFEST, read_json
from unclip.errors import UnclipError
from unclip.interop.karlo import ConvertOptions, DiffusersKarlo, write_bundle
from unclip.interop.karlo_original import SUFFIXES, OriginalKarlo, found_files
from unclip.upscaling import Progress

Found = tuple[list[str], list[str]]
"""What of a layout is there, and what of it is missing."""


@dataclass(frozen=True)
class Layout:
    """One layout. `look` reads names, and tensors' headers where names say nothing; it finds nothing in a folder of
    another kind. `convert` writes a bundle of folders in which `look` missed nothing.
    """

    name: str
    title: str
    look: Callable[[Sequence[Path]], Found]
    convert: Callable[[Sequence[Path], Path, ConvertOptions, Progress | None], None]


def detect(folders: Sequence[Path]) -> Layout:
    """The layout of these folders, which belong together.

    Raises UnclipError: no such folder; a layout that is incomplete, or none that is known, in one sentence with what
    was found, what is missing and the nearest layout.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UnclipError(f"no folder {str(folder)!r}; name one that holds a model, or a Hub id user/name")
        if (folder / MANIFEST).is_file():
            raise UnclipError(f"{folder} is a bundle already ({MANIFEST} is there); use it as it is")
    looks = [(layout, *layout.look(folders)) for layout in LAYOUTS]
    for layout, found, missing in looks:
        if found and not missing:
            return layout
    where = " and ".join(str(folder) for folder in folders)
    layout, found, missing = max(looks, key=lambda one: len(one[1]) / max(1, len(one[1]) + len(one[2])))
    if found:
        raise UnclipError(
            f"{where} is incomplete as {layout.title}: found {', '.join(found)}; missing {', '.join(missing)}"
        )
    there = ", ".join(sorted({path.name for folder in folders for path in folder.iterdir()})[:8]) or "nothing"
    known = "; ".join(layout.title for layout in LAYOUTS)
    raise UnclipError(f"{where} has no layout that is known here (found: {there}); known: {known}")


def recognised(folders: Sequence[Path]) -> bool:
    """Whether anything of any layout is there."""
    return any(layout.look(folders)[0] for layout in LAYOUTS)


def convert(
    folders: Sequence[Path], out: Path, options: ConvertOptions | None = None, progress: Progress | None = None
) -> Layout:
    """Somebody else's checkpoint -> a bundle at `out`. Returns its layout. Raises UnclipError as `detect` and as the
    layout's own conversion.
    """
    layout = detect(folders)
    layout.convert(folders, out, options or ConvertOptions(), progress)
    return layout


def _look_diffusers(folders: Sequence[Path]) -> Found:
    karlo = DiffusersKarlo(folders)
    needed = ["decoder", "text_proj", "text_encoder", "decoder_scheduler"]
    if karlo.place("prior") is not None or karlo.place("prior_scheduler") is not None:
        needed += ["prior", "prior_scheduler"]
    if any(karlo.place(name) is not None for name in ("super_res_first", "super_res_last", "super_res_scheduler")):
        needed += ["super_res_first", "super_res_scheduler"]
    found = [name for name in needed if karlo.place(name) is not None]
    networks = [karlo.place(name) for name in ("text_proj", "super_res_first", "decoder", "prior")]
    if not any(place is not None and not _is_part(place) for place in networks):
        return [], needed
    return found, [name for name in needed if name not in found]


def _is_part(folder: Path) -> bool:
    """Whether it is a part of one of our bundles, which has folders of the same names."""
    try:
        return "kind" in read_json(folder / "config.json")
    except UnclipError:
        return False


def _look_original(folders: Sequence[Path]) -> Found:
    needed = ["the decoder's .ckpt"]
    if len(folders) != 1 or not any(path.suffix in SUFFIXES[:2] for path in folders[0].iterdir()):
        return [], needed
    files, statistics = found_files(folders[0])
    there = {
        "the prior's .ckpt": "prior" in files,
        "the CLIP statistics (.th)": statistics is not None,
        "the decoder's .ckpt": "decoder" in files,
        "the super-resolution's .ckpt": "upsampler_256" in files,
    }
    if there["the prior's .ckpt"] != there["the CLIP statistics (.th)"]:
        needed += ["the prior's .ckpt", "the CLIP statistics (.th)"]
    return [name for name, is_there in there.items() if is_there], [name for name in needed if not there[name]]


LAYOUTS: list[Layout] = [
    Layout(
        "karlo-diffusers",
        "an unCLIP in diffusers' layout (folders prior, decoder, text_proj, text_encoder, super_res_first, …)",
        _look_diffusers,
        lambda folders, out, options, progress: write_bundle(DiffusersKarlo(folders), out, options, progress),
    ),
    Layout(
        "karlo-original",
        "Karlo's original checkpoints (*.ckpt and ViT-L-14_stats.th in one folder)",
        _look_original,
        lambda folders, out, options, progress: write_bundle(OriginalKarlo(folders[0]), out, options, progress),
    ),
]
