"""A trained run, opened."""
