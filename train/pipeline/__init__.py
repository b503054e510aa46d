"""Micro-batches through the stages of a pipeline: in which order, and what neighbours hand on."""
