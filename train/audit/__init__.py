"""Which token went to which expert, and why."""
