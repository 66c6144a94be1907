"""Formats: items into bytes."""
