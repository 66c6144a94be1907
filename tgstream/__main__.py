"""The command line: ``python -m tgstream doctor [config.ini]``."""

import sys

from .doctor.cli import main

if __name__ == "__main__":
    sys.exit(main())
