"""One rank as a process."""
