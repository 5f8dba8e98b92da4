"""The ops of the GLM family: about twenty, as coarse as the fusions that pay, one file per family.

The package imports every family on purpose: an op exists once its file is loaded, and whoever asks
for `all_ops` must see all of them."""

from glm_core.dispatch import REGISTRY, Op
from glm_core.ops.activation import geglu, gelu, swiglu
from glm_core.ops.attention import attention
from glm_core.ops.embedding import embedding
from glm_core.ops.experts import grouped_linear, permute, quantized_grouped_linear, unpermute
from glm_core.ops.linear import linear
from glm_core.ops.loss import linear_cross_entropy
from glm_core.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from glm_core.ops.optim import adamw, global_norm
from glm_core.ops.quant import quantized_linear
from glm_core.ops.rope import rope
from glm_core.ops.routing import route

__all__ = [
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "embedding",
    "geglu",
    "gelu",
    "global_norm",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "permute",
    "quantized_grouped_linear",
    "quantized_linear",
    "rms_norm",
    "rope",
    "route",
    "swiglu",
    "unpermute",
    "all_ops",
]


def all_ops() -> dict[str, Op]:
    """Returns every declared op by name, including those of third parties."""
    return dict(sorted(REGISTRY.items()))
