"""Attention variants behind one call."""
