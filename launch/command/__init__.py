"""What every command shares: it is composed, called, explained and ended."""
