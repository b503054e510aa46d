"""Settings of a run on disk: saved, read back, compared, continued."""
