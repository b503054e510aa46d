"""Looks at training and never touches it."""
