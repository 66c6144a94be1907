"""Tests of ``tgstream.metrics``, with real servers that export their metrics."""
