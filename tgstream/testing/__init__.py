"""Tests of streams: requests in process, whose response is read chunk by chunk."""

from .client import OpenStream, open_stream
from .leaks import assert_clean

__all__ = ["OpenStream", "assert_clean", "open_stream"]
