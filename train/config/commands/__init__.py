"""Settings of the commands that use a trained run."""
