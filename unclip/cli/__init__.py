"""The command line `unclip`. Heavy modules are imported inside the commands, so that `unclip --help` answers
at once.
"""

from unclip.cli.entry import main

__all__ = ["main"]
