"""Triton kernels: scores of an index, the choice of the largest, and the scores' gradients."""
