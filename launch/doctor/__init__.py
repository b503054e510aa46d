"""What a machine lacks before it can train."""
