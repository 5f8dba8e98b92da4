"""A hardware-portable backend layer for GLM: one model, pluggable backends, one verdict on their
loss curves."""

__version__ = "0.1.0"
