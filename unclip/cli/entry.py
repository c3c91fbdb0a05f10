"""`main`: run a command and turn whatever goes wrong into one sentence and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer

from unclip import lean
from unclip.errors import UnclipError
from unclip.notices import in_lines

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 failure, 2 wrong usage, 130 interrupted."""
    if argv is None:  # called as the command, and not by a program
        lean.claim_process()
    debug, arguments = _take_debug(list(sys.argv[1:] if argv is None else argv))
    streams = sys.stdout, sys.stderr
    with _quiet(debug):
        try:
            from unclip.cli.app import app

            result = typer.main.get_command(app).main(
                args=arguments, prog_name="unclip", standalone_mode=False
            )
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):  # at a broken pipe typer wraps the streams and ends the process
            sys.stdout, sys.stderr = streams
            return _broken_pipe()
        except KeyboardInterrupt:
            return _say("interrupted", _INTERRUPTED)
        except typer.Abort:
            return _say("aborted", 1)
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, code = explain(error)
            return _say(message, code)
        if result == _INTERRUPTED:  # typer has caught the KeyboardInterrupt
            return _say("interrupted", _INTERRUPTED)
        return result if isinstance(result, int) else 0


def explain(error: Exception) -> tuple[str, int]:
    """One sentence and the exit code for an exception."""
    if isinstance(error, UnclipError):
        return str(error), error.exit_code
    if hasattr(
        error, "format_message"
    ):  # typer's usage errors; their module differs between typer's versions
        context = getattr(error, "ctx", None)
        where = f"{context.command_path} --help" if context is not None else "unclip --help"
        text = _sentence(error.format_message().replace("Value error, ", "")) + _received(error) + _remedy(error)
        return f"{text} (see `{where}`)", int(getattr(error, "exit_code", 2))
    if is_out_of_memory(error):
        return (
            "out of memory; try a smaller --size, --batch-size 1 or another --device",
            1,
        )
    hint = "run with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {_first_line(error)} ({hint})", 1


def _received(error: Exception) -> str:
    """What came, where typer hands on pydantic's sentence, which leaves that out."""
    cause: Any = error.__cause__
    if not hasattr(cause, "errors") or "Input should" not in str(error):
        return ""
    return f", got {cause.errors()[0]['input']!r}"


def _remedy(error: Exception) -> str:
    """What to do about words that belong to no option: of a command of prompts they are one, or the rest of one."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if "unexpected extra argument" not in str(error) or command is None:
        return ""
    if any("--prompt" in getattr(parameter, "opts", ()) for parameter in command.params):
        return "; a prompt stands behind --prompt, in quotes if it has several words: --prompt 'red apple'"
    return ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, the CPU allocator or CUDA ran out of memory."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts))


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """`--debug` may stand before or after the command; what follows `--` is left alone."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(kept) < end, kept + arguments[end:]


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Print this project's warnings as one line each; libraries keep theirs and their log records to
    themselves.
    """

    def library(message: Any, *_: Any, **__: Any) -> None:
        if debug:
            print(f"unclip: warning: {' '.join(str(message).split())}", file=sys.stderr)

    before = logging.root.manager.disable
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = in_lines("unclip", library)
        logging.disable(before if debug else logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _say(message: str, code: int) -> int:
    print(f"unclip: {' '.join(message.split())}", file=sys.stderr)
    return code


def _broken_pipe() -> int:
    """The reader has gone; nothing is left to say, not even by Python's own flush at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _sentence(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
