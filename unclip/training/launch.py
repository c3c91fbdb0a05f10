"""What every train_*.py shares: arguments, configuration, errors that end in one sentence."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from unclip.config import ConfigT, DataConfig, TrainConfig, load_config
from unclip.errors import UnclipError, UsageError
from unclip.notices import CaptionCut, in_lines
from unclip.training.settings import deepspeed_config, settle
from unclip.training.wandb_run import mode_from

if TYPE_CHECKING:
    from unclip.data import Batches, Complete
    from unclip.training.distributed import Distributed


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage before it; of several processes the first does."""

    def error(self, message: str) -> NoReturn:
        told = f"{self.prog}: {message} (see `{self.prog} --help`)\n"
        self.exit(2, told if int(os.environ.get("RANK", 0)) == 0 else None)


def main_for(
    config_cls: type[ConfigT],
    run: Callable[[ConfigT, Distributed], Any],
    description: str,
    argv: list[str] | None = None,
) -> None:
    """Parse `--config FILE [key=value …]`, load the configuration and run. Exit code 2 for wrong usage, 1 for failure,
    130 and 143 after SIGINT and SIGTERM; whatever goes wrong is told in one sentence, and with --debug as a traceback.
    PyTorch loads when the configuration is found to be right.
    """
    parser = _Parser(description=description)
    parser.add_argument("--config", required=True, help="YAML file; the ready ones are in configs/")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--print-deepspeed", action="store_true", help="show the JSON DeepSpeed would get, and end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=1000 data.source=FOLDER")
    arguments = parser.parse_intermixed_args(argv)
    script, is_main = Path(sys.argv[0]).name, int(os.environ.get("RANK", 0)) == 0
    before = signal.signal(signal.SIGTERM, _terminated)  # the loop, once it runs, saves first
    if argv is None:  # called as a script, and not by a program, which has warnings of its own
        warnings.showwarning = in_lines(script, warnings.showwarning)
        if not is_main:
            warnings.simplefilter("ignore", CaptionCut)  # one process tells of it
    try:
        config = load_config(config_cls, arguments.config, arguments.overrides)
        train = getattr(config, "train", None)
        if isinstance(train, TrainConfig):
            world_size = int(os.environ.get("WORLD_SIZE", 1))
            train = settle(train, world_size)
            config = config.model_copy(update={"train": train})
            mode_from(train.wandb)  # a WANDB_MODE that does not exist is told now, not when all is loaded
            if arguments.print_deepspeed:
                if is_main:
                    print(json.dumps(deepspeed_config(train, world_size), indent=2))
                return
        from unclip.training.distributed import current

        run(config, current())
    except UnclipError as error:
        if arguments.debug:
            raise
        # A mistake in the configuration is met by every process alike.
        if not getattr(error, "quiet", isinstance(error, UsageError) and not is_main):
            print(f"{script}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if is_main:
            print(f"{script}: interrupted; what was saved before is there to go on from", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if arguments.debug:
            raise
        lines = str(error).strip().splitlines()
        told = f"unexpected {type(error).__name__}: {lines[0] if lines else 'no message'}; --debug shows where"
        print(f"{script}: {told}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def open_batches(
    data: DataConfig, train: TrainConfig, distributed: Distributed, complete: Complete | None = None
) -> Batches:
    """This process's share of the training data; `complete` as `unclip.data.build_batches` takes it."""
    from unclip.data import build_batches
    from unclip.training.engine import micro_batch_size

    return build_batches(
        data,
        batch_size=micro_batch_size(train, distributed),
        rank=distributed.rank,
        world_size=distributed.world_size,
        seed=train.seed,
        complete=complete,
    )
