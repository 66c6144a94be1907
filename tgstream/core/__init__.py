"""One stream: from its items to its end."""
