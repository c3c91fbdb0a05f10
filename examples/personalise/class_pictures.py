"""Draw pictures of a class with the model itself: what DreamBooth's prior preservation holds on to.

    python examples/personalise/class_pictures.py --prompt "red apple" --prompt "green apple" --out data/class

The folder is a data set as `data.source` takes it, one picture of each prompt and seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from subject import write

from unclip import UnCLIP
from unclip.errors import UnclipError, UsageError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", required=True, help="captions of the class; repeatable")
    parser.add_argument("--out", type=Path, default=Path("data/class"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--num-images", type=int, default=16, help="of each prompt")
    parser.add_argument("--size", type=int, default=64, help="the size that the run trains at, or above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    try:
        if (arguments.out / "metadata.jsonl").exists():
            raise UsageError(f"{arguments.out} holds a data set already; name another folder")
        model = UnCLIP.from_pretrained(arguments.model, device=arguments.device, size=arguments.size)
        draw(model, arguments.prompt, arguments.out, arguments.num_images, arguments.size, arguments.seed)
    except UnclipError as error:
        print(f"class_pictures.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def draw(model: UnCLIP, prompts: list[str], out: Path, count: int, size: int, seed: int = 0, batch: int = 8) -> None:
    """`count` pictures of each prompt, with their prompts as captions."""
    images, captions = [], []
    for prompt in prompts:
        for first in range(0, count, batch):
            number = min(batch, count - first)
            images += model.sample(prompt, num_images=number, seed=seed + first, size=size)
            captions += [prompt] * number
    write(out, images, captions)


if __name__ == "__main__":
    main()
