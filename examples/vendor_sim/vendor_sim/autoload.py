"""torch's entry point `torch.backends`: importing torch brings the device. A module of its own,
since `import vendor_sim` may be what imports torch, and is then not done yet."""


def autoload() -> None:
    """Nothing is left to do: finding this function has imported the package."""
