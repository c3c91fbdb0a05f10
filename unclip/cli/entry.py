"""`main`: run a command and turn whatever goes wrong into one sentence and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer

from unclip import lean
from unclip.errors import UnclipError
from unclip.notices import in_lines

_INTERRUPTED, _TERMINATED = 130, 143  # 128 + SIGINT, SIGTERM
_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What the system refuses and nobody can help in here."""


class _Terminated(BaseException):
    """SIGTERM came. No SystemExit, which typer raises at a broken pipe; no Exception, which others catch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 failure, 2 wrong usage, 130 interrupted, 143 terminated."""
    if argv is not None:
        return _run(list(argv))
    lean.claim_process()  # called as the command, and not by a program
    try:
        with _unwinding():
            return _run(sys.argv[1:])
    except _Terminated:
        return _say("terminated", _TERMINATED)


def _run(argv: list[str]) -> int:
    debug, arguments = _take_debug(argv)
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
            if isinstance(error, OSError) and error.filename is None and not _flushed():
                return _say(f"cannot write to stdout: {error.strerror or error}", _deaf())
            return _say(*explain(error, arguments))
        if result == _INTERRUPTED:  # typer has caught the KeyboardInterrupt
            return _say("interrupted", _INTERRUPTED)
        return result if isinstance(result, int) else 0


@contextmanager
def _unwinding() -> Iterator[None]:
    """Within it SIGTERM unwinds, as Ctrl-C does, so that what is half written goes away. It is left alone where
    somebody else has a use for it.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def unwind(number: int, _: FrameType | None) -> None:
        if os.getpid() != own:  # a worker, which has nothing to clear up and would print a traceback
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # a second one would end the clearing up
        raise _Terminated

    try:
        signal.signal(signal.SIGTERM, unwind)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def explain(error: Exception, arguments: Sequence[str] = ()) -> tuple[str, int]:
    """One sentence and the exit code for an exception that the command line `arguments` led to."""
    if isinstance(error, UnclipError):
        return str(error), error.exit_code
    if hasattr(
        error, "format_message"
    ):  # typer's usage errors; their module differs between typer's versions
        if str(error).rstrip(".").endswith("is not readable"):  # typer looks before the command does
            return f"{_sentence(str(error)).removesuffix('is not readable')}cannot be read: permission denied", 1
        context = getattr(error, "ctx", None)
        where = f"{context.command_path if context is not None else _command(arguments)} --help"
        text = _sentence(error.format_message().replace("Value error, ", "")) + _received(error) + _remedy(error)
        return f"{text} (see `{where}`)", int(getattr(error, "exit_code", 2))
    if is_out_of_memory(error):
        return (
            "out of memory; try a smaller --size, --batch-size 1 or another --device",
            1,
        )
    if isinstance(error, OSError) and error.errno in _OUTSIDE and error.strerror:
        return f"{error.filename or 'cannot write'}: {error.strerror}", 1
    hint = "run with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {_first_line(error)} ({hint})", 1


def _command(arguments: Sequence[str]) -> str:
    """The command of a command line, where typer does not say which one it read."""
    from unclip.cli.app import app

    first = next((argument for argument in arguments if not argument.startswith("-")), "")
    known = getattr(typer.main.get_command(app), "commands", {})
    return f"unclip {first}" if first in known else "unclip"


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


def _flushed() -> bool:
    """Whether stdout takes what was printed."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _broken_pipe() -> int:
    """The reader has gone; nothing is left to say."""
    return _deaf()


def _deaf() -> int:
    """Keep Python's own flush at the end from telling once more that stdout takes nothing; the exit code."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _sentence(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
