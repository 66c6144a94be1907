"""A stream's sessions and its transaction."""
