"""Prompts of a file: read line by line, answered together, appended as they end."""
