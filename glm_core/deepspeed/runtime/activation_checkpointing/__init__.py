"""Recomputes activations in the backward pass."""
