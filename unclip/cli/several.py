"""Options that take several values at once: `--dims 20 30 40` as well as `--dims 20 --dims 30 --dims 40`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


def several(*, numbers: tuple[str, ...] = (), texts: tuple[str, ...] = ()) -> type[TyperCommand]:
    """A class of command whose repeatable options of these names take the arguments behind them too, up to the next
    option.

    An option of numbers takes numbers only, so that a file's name may follow it; behind one of text, `--` ends the
    values.
    """
    repeatable = {**dict.fromkeys(numbers, True), **dict.fromkeys(texts, False)}

    class SeveralValues(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, spread(args, repeatable))

    return SeveralValues


def spread(arguments: list[str], repeatable: dict[str, bool]) -> list[str]:
    """The arguments with each further value of a repeatable option (name -> whether it takes numbers) behind its own
    name.
    """
    result: list[str] = []
    option, fresh = "", False  # the repeatable option under way, and whether it still waits for its first value
    for place, argument in enumerate(arguments):
        if argument == "--":
            return result + arguments[place + (1 if option and not fresh else 0) :]
        if fresh:
            result.append(argument)
            fresh = False
            if argument.startswith("-") and not _is_number(argument):  # the value was forgotten; click will tell
                option = ""
        elif argument in repeatable:
            option, fresh = argument, True
            result.append(argument)
        elif option and (_is_number(argument) if repeatable[option] else not argument.startswith("-")):
            result += [option, argument]
        else:
            option = ""
            result.append(argument)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
