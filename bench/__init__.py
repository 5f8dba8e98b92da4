"""Holds the benches: each measures against a peer or a measured ceiling. Run one as `python -m
glm_core.bench.NAME`."""

if __name__ == "bench":
    raise ImportError("the name `bench` is not this package; write `from glm_core import bench`")
