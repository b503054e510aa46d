"""Functions on tensors: each op has a reference, an interface and its tests."""
