"""Runs models that are lists of layers, cut into pipeline stages (`deepspeed.runtime.pipe`)."""

from glm_core.deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from glm_core.deepspeed.runtime.pipe.topology import ProcessTopology

__all__ = ["LayerSpec", "PipelineModule", "ProcessTopology", "TiedLayerSpec"]
