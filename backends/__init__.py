"""One folder per backend. The registry finds the folders here and, for other packages, the entry
points of the group `glm_core.backends`."""

if __name__ == "backends":
    raise ImportError(
        "the name `backends` is not this package; write `from glm_core import backends`"
    )
