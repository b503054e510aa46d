"""Benches: python -m bench.<name> [--device cpu|cuda] [--json FILE]."""
