"""What a training run would take on a cluster: feasible plans with memory and time by part, checked
against published runs. Arithmetic only; imports no torch device."""
