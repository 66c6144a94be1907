"""The rows that a statement selects, as items."""
