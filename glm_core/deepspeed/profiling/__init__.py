"""Counts what a step computes."""
