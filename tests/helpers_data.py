"""Data sets that the tests of unclip.data write."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.config import DataConfig, parse_config
from unclip.data import Batches, build_batches


def encoded(index: int, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture whose grey value tells which it is."""
    stream = io.BytesIO()
    Image.new("RGB", size, (index % 32 * 8,) * 3).save(stream, kind)
    return stream.getvalue()


def write_tar(file: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A webdataset tar: key → ending → content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for key, members in samples.items():
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file


def plain(numbers: range | list[int], **about: Any) -> dict[str, dict[str, bytes]]:
    """Samples with picture, caption `c<number>` and a json of `about`, whose values are functions of the number."""
    return {
        f"{i:05d}": {
            "png": encoded(i),
            "txt": f"c{i}".encode(),
            "json": json.dumps({name: make(i) for name, make in about.items()}).encode(),
        }
        for i in numbers
    }


def write_shards(folder: Path, lengths: list[int], **about: Any) -> Path:
    """Tars of these many samples, numbered on."""
    first = 0
    for shard, length in enumerate(lengths):
        write_tar(folder / f"{shard:05d}.tar", plain(range(first, first + length), **about))
        first += length
    return folder


def write_parquet(folder: Path, lengths: list[int]) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, length in enumerate(lengths):
        rows = range(first, first + length)
        images = [{"bytes": encoded(i), "path": None} for i in rows]
        table = arrow.table({"image": images, "text": [f"c{i}" for i in rows], "key": [f"k{i}" for i in rows]})
        parquet.write_table(table, folder / f"{shard:05d}.parquet", row_group_size=4)
        first += length
    return folder


def build(source: str | Path | None = None, batch_size: int = 4, **options: Any) -> Batches:
    split = {key: options.pop(key) for key in ("rank", "world_size", "seed") if key in options}
    body = {"image_size": 8, **options, **({} if source is None else {"source": str(source)})}
    return build_batches(parse_config(DataConfig, body), batch_size=batch_size, **split)


def captions(batches: Batches, count: int) -> list[str]:
    return [caption for batch in islice(batches, count) for caption in batch["caption"]]
