"""Channels: events between requests, processes and machines."""
