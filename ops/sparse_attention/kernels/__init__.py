"""Triton kernels of sparse attention, one file per step; triton_backend.py launches them."""
