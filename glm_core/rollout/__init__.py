"""Judges whether an engine that samples and one that trains give the same tokens the same
probabilities, and names what makes them differ (docs/rollout.md)."""
