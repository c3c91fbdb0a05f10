"""Small evaluations that the tests of unclip.evaluation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip.clip import FrozenCLIP
from unclip.config import DataConfig, parse_config
from unclip.evaluation.dataset import EvaluationData
from unclip.evaluation.drawing import Drawn
from unclip.evaluation.features import Extractor
from unclip.evaluation.measuring import Evaluation
from unclip.pipeline import UnCLIP

SIZE = 64


def write_folder(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` pictures of noise with captions, as a data set."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"images/{number}.png")
        lines.append(json.dumps({"file_name": f"images/{number}.png", "caption": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def data(source: Path | str, limit: int | None = None, **options: Any) -> EvaluationData:
    body = {"source": str(source), "image_size": SIZE, **options}
    return EvaluationData(parse_config(DataConfig, body), limit)


def extractor(bundle: Path, **options: Any) -> Extractor:
    name = str(bundle / "clip")
    return Extractor(FrozenCLIP.load(name), name, **options)


def evaluation(bundle: Path, source: Path, limit: int = 40, **options: Any) -> Evaluation:
    """Of the tiny bundle's pictures for captions of a folder, against all of it."""
    system = UnCLIP.from_pretrained(bundle, size=SIZE)
    drawn = Drawn(system, {"size": SIZE}, num_images=options.pop("num_images", 1), batch_size=16)
    given = {"system": system, "reconstructions": 0, **options}
    return Evaluation(drawn, data(source, limit), data(source), extractor(bundle), SIZE, **given)
