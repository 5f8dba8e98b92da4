"""Measures: interleaved rounds, rows that record the machine, its ceilings, and how noisy it
was."""
