"""The transformer, on one device or sharded, without training or files."""
