"""Routers behind one call."""
