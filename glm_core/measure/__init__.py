"""How a figure is taken: interleaved rounds, the machine beside every row, what it reaches at most,
how noisy it was."""
