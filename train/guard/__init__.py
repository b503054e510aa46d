"""What acts on a run: routes, skips or ends its steps, and rings."""
