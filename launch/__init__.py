"""Entry points: compose the config, validate it, spawn processes, call train and model."""
