"""Proves that a plan trains as one process does: real processes on this machine, held to what
honest rounding explains."""
