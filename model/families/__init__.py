"""Published model families: their config.json in our words and back, and their names on disk."""
