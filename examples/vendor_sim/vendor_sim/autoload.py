"""Serves torch's entry point `torch.backends`, so that importing torch registers the device. It is
a module of its own because `import vendor_sim` may itself import torch, and is not finished
then."""


def autoload() -> None:
    """Does nothing: importing this module has imported the package."""
