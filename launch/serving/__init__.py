"""Answering over HTTP: bodies in, an engine in a thread of its own, answers and metrics out."""
