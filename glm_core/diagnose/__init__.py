"""What goes wrong while something runs, said in one line: a device that gives up, a hang, a number
that is not finite."""
