"""Runs GLM on any hardware: one model, pluggable backends, and a verdict on their loss curves."""

__version__ = "0.1.0"
