"""Planning which rank serves which expert."""
