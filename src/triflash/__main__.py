"""The command line: ``triflash`` or ``python -m triflash``."""

import sys

from .cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
