"""Saving, finding and reading checkpoints."""
