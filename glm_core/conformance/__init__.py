"""Judges a backend op by op: every case comes from an op's own samples and is compared with the
float64 reference. The way in is `run` in `glm_core.conformance.run`."""
