"""Runs GLM on any hardware: one model, pluggable backends, and a verdict on their loss curves."""

from glm_core import versions

__version__ = "0.1.0"
versions.check()
