"""Generating for many requests at once: what is computed together, and what each of them gets."""
