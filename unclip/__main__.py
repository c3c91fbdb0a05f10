"""`python -m unclip` is the `unclip` command."""

import sys

from unclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
