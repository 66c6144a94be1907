"""Where the events of channels are kept."""
