"""Everything around the model: engine, loop, data, checkpoints, metrics."""
