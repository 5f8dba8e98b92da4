"""Recomputing activations in the backward pass."""
