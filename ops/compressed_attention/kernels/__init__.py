"""Triton kernels of the pool that makes entries; triton_backend.py starts them."""
