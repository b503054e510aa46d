"""From text to batches: sources, prepare, store, packing, loader."""
