"""Predicts what a training run takes on a cluster: which plans fit, with their memory and time by
part, checked against published runs. Arithmetic only; no device is used."""
