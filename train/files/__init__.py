"""Durable files, and which of them to trust."""
