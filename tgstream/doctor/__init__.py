"""Checks of an application: whether its streams reach the client."""
