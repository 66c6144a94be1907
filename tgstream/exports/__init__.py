"""Exports: the rows that a statement selects, as items for any format."""
