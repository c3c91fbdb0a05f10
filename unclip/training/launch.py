"""What every train_*.py shares: arguments, configuration, errors that end in one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unclip.config import ConfigT, DataConfig, TrainConfig, load_config
from unclip.data import Batches, build_batches
from unclip.errors import UnclipError
from unclip.training.distributed import Distributed, current
from unclip.training.engine import micro_batch_size


def main_for(
    config_cls: type[ConfigT],
    run: Callable[[ConfigT, Distributed], Any],
    description: str,
    argv: list[str] | None = None,
) -> None:
    """Parse `--config FILE [key=value …]`, load the configuration and run. Exit code 2 for wrong usage, 1 for
    failure."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file; the ready ones are in configs/")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=1000 data.source=FOLDER")
    arguments = parser.parse_intermixed_args(argv)
    try:
        run(load_config(config_cls, arguments.config, arguments.overrides), current())
    except UnclipError as error:
        if arguments.debug:
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def open_batches(data: DataConfig, train: TrainConfig, distributed: Distributed) -> Batches:
    """This process's share of the training data."""
    return build_batches(
        data,
        batch_size=micro_batch_size(train, distributed),
        rank=distributed.rank,
        world_size=distributed.world_size,
        seed=train.seed,
    )
