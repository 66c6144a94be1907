"""Tests of streams: requests in process, and responses read chunk by chunk."""

from .client import OpenStream, open_stream
from .leaks import assert_clean

__all__ = ["OpenStream", "assert_clean", "open_stream"]
