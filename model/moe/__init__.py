"""Mixture of experts: route, dispatch, compute, combine; balance and budget."""
