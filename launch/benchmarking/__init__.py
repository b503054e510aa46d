"""Measuring generation: what is run, what a request's times say, and how sure a ratio is."""
