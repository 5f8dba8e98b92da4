"""Measures how sharp the verdict is: how many planted faults it convicts and bisection names, and
how many benign changes it acquits."""
