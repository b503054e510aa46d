"""Decoding steps as CUDA graphs, captured once for every shape and replayed on its memory."""
