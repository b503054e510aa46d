"""Settings as records, without torch."""
