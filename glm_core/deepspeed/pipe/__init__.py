"""Makes `from deepspeed.pipe import PipelineModule, LayerSpec, TiedLayerSpec` work."""

from glm_core.deepspeed.runtime.pipe import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]
