"""How sharp the verdict is: planted faults found, benign changes acquitted, ops named
by bisection."""
