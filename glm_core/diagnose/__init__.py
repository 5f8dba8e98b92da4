"""Explains in one line what went wrong in a run: a failing device, a hang, a number that is not
finite."""
