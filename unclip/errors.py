"""Errors a user can cause. Each message says what came, what was expected, and what to do."""

from __future__ import annotations


class UnclipError(Exception):
    """A failure that the user can understand and mend; the command ends with exit code 1."""

    exit_code = 1


class UsageError(UnclipError):
    """Wrong usage: an argument or option that cannot be meant; the command ends with exit code 2."""

    exit_code = 2
