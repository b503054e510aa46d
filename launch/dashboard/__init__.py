"""The W&B dashboard of a run as code."""
