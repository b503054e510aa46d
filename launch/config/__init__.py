"""From text to checked records."""
