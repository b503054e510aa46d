"""Triton kernels of the grouped MLP; triton_backend.py launches them."""
