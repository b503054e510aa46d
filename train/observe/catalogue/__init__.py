"""Every metric that a run can log: its name, unit, which way is better, what it means and when."""
