"""Pipelines: a list of layers, cut into stages."""

from glm_core.deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from glm_core.deepspeed.runtime.pipe.topology import ProcessTopology

__all__ = ["LayerSpec", "PipelineModule", "ProcessTopology", "TiedLayerSpec"]
