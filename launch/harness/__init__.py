"""Tasks of lm-evaluation-harness, asked of a model of ours."""
