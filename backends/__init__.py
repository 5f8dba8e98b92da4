"""One folder per backend; found by scanning this folder and the entry point group
`glm_core.backends`."""

if __name__ == "backends":
    raise ImportError(
        "the name `backends` is not this package; write `from glm_core import backends`"
    )
