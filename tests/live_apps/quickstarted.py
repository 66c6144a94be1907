"""The application of a folder that ``gearbox quickstart`` made.

Like ``gearbox serve``, it configures logging first and then loads the application.
"""

from __future__ import annotations

import logging.config
import sys
from pathlib import Path
from typing import Any

from paste.deploy import loadapp


def make_app(config: str) -> Any:
    """Return the application of the ``.ini`` file ``config``."""
    file = Path(config)
    sys.path.insert(0, str(file.parent))
    logging.config.fileConfig(file, disable_existing_loggers=False)
    return loadapp(f"config:{file}")
