"""orjson, or None where it is not installed.

Rule: whatever it is asked, the same answer is had without it, later.
"""

from __future__ import annotations

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment, unused-ignore]

__all__ = ["orjson"]
