"""Which rank serves which expert."""
