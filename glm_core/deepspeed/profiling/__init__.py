"""Counts of what a step computes."""
