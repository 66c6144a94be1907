"""Everything that TurboGears calls."""
