"""Triton kernels: scores of an index, the choice of the largest, what teaches it inside sparse
attention, and the scores' gradients.
"""
