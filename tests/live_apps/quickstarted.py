"""The application of a folder that ``gearbox quickstart`` made, by its ``.ini`` file.

It is made as ``gearbox serve`` does it: the logging of the file first, then the
application.
"""

from __future__ import annotations

import logging.config
import sys
from pathlib import Path
from typing import Any

from paste.deploy import loadapp


def make_app(config: str) -> Any:
    """The application that the file ``config`` describes."""
    file = Path(config)
    sys.path.insert(0, str(file.parent))
    logging.config.fileConfig(file, disable_existing_loggers=False)
    return loadapp(f"config:{file}")
