"""The error that tgstream raises."""


class StreamError(Exception):
    """tgstream cannot do what was requested. The message contains the remedy."""
