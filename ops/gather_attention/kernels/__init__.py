"""Triton kernels that gather chosen rows, one file per direction; triton_backend.py starts them."""
