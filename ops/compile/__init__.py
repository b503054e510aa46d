"""Compiling kernels, when needed and ahead of time."""
