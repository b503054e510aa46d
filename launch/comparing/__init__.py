"""Variants of a model side by side: what is run, what it says, and what is decided by it."""
