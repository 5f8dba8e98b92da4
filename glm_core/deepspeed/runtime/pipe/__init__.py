"""`deepspeed.runtime.pipe`: models as lists of layers, cut into pipeline stages."""

from glm_core.deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from glm_core.deepspeed.runtime.pipe.topology import ProcessTopology

__all__ = ["LayerSpec", "PipelineModule", "ProcessTopology", "TiedLayerSpec"]
