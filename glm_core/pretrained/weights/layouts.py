"""Describes every checkpoint layout of the family as data: names, order of QKV rows, config keys.

`ours` is a name in our GLM or ModelConfig, `theirs` the key of the layout. Tensor-parallel ranks
cut a parameter in the same way in every layout, by SPLITS. Sources of the key names: THUDM/GLM
change_mp.py and generation code, GLM-130B tools/convert_tp.py, modeling_chatglm.py of ChatGLM-6B
and ChatGLM3, transformers 5.23 glm and glm4."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from glm_core.config import ModelConfig
from glm_core.errors import CheckpointError, unknown
from glm_core.model.glm import QUANTIZED
from glm_core.model.quantize import HEADS
from glm_core.pretrained.weights import expert_names

Sections = Literal["whole", "halves", "qkv"]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """How tensor-parallel ranks cut a parameter."""

    dim: int | None
    """dimension that is cut; None: every rank holds the whole"""
    sections: Sections = "whole"
    """parts that are cut separately: the `halves` of a gated projection, the heads of q, k and v"""


WHOLE, ROWS, COLUMNS = Split(None), Split(0), Split(1)
SPLITS = {
    "embedding": ROWS,
    "head": ROWS,
    "attention.qkv.weight": Split(0, "qkv"),
    "attention.qkv.bias": Split(0, "qkv"),
    "mlp.up.weight": Split(0, "halves"),
    "mlp.up.bias": Split(0, "halves"),
    "attention.out.weight": COLUMNS,
    "mlp.down.weight": COLUMNS,
}
"""by our name, without `blocks.N.`; every rank holds the whole of all other parameters"""


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A field of our ModelConfig and its keys in the layout's config."""

    ours: str
    theirs: tuple[str, ...]
    """dotted paths; the first one present is read, the first one is written"""
    default: Any = None
    """value if no key is present; None: a key is required. An ffn of 0 means 4 * hidden"""
    unit: float | None = None
    """ours = theirs * unit"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store the model."""

    name: str
    about: str
    """models that are stored so"""
    names: dict[str, str]
    """our parameter or module -> theirs; {i} is the layer's number, {p} one of q, k, v, {g} gate or
    up, {e} the expert's number"""
    qkv: Literal["blocks", "heads", "separate"]
    """blocks: all rows of q, then k, then v; heads: q, k, v of each head in turn; separate: three
    tensors"""
    sharded: bool = False
    """True: written as mp_rank_XX_model_states.pt, one per tensor-parallel rank; False: as
    safetensors"""
    quantized: bool = False
    """whether linears may be stored as `weight`, int8 or packed int4, and `weight_scale`, a scale a
    row"""
    prefixes: tuple[str, ...] = ("",)
    """what may precede every key; the first is written"""
    ignored: str = r"(.*\.)?inv_freq"
    """regular expression of keys that hold no learned value; the same layout writes them again"""
    training_state: str = r"(?!)"
    """regular expression of keys that only a resumed run needs; they are never written"""
    fields: tuple[Field, ...] = ()
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """our fields that are the same in all models of this layout"""
    required: dict[str, Any] = dataclasses.field(default_factory=dict)
    """their keys that must have this value, or one of a tuple, if they are present; the first is
    written too"""
    left_out: dict[str, Any] = dataclasses.field(default_factory=dict)
    """what the authors' code takes for a required key that is left out, where that is another
    value"""
    rope_table: bool = False
    """whether the rotation is described as in transformers, by `rope_parameters`"""
    rope_share: float = 0.5
    """the share of a head that is rotated where `rope_parameters` does not say it"""
    header: dict[str, Any] = dataclasses.field(default_factory=dict)
    """their keys that name the architecture"""

    def keys(self, ours: str, config: ModelConfig) -> tuple[str, ...]:
        """Returns the keys, without prefix, that hold our parameter: one, or one for each part of
        its rows, in our order."""
        match = re.match(r"blocks\.(\d+)\.(.*)", ours)
        layer, name = (match[1], "blocks.{i}." + match[2]) if match else ("", ours)
        leaf = ""
        if name not in self.names:
            name, _, leaf = name.rpartition(".")
        theirs = self.names[name] + (f".{leaf}" if leaf else "")
        return tuple(
            theirs.format(i=layer, p=p, g=g, e=e)
            for e in (range(config.num_experts) if "{e}" in theirs else "-")
            for p in ("qkv" if "{p}" in theirs else "-")
            for g in (("gate", "up") if "{g}" in theirs else "-")
        )

    def parts(
        self, ours: str, shape: tuple[int, ...], config: ModelConfig
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of what each of a parameter's keys holds. shape: of the parameter, or
        of one rank's part of it."""
        keys = self.keys(ours, config)
        if len(keys) == 1:
            return {keys[0]: shape}
        if ".experts_" in ours:
            each, (_, rows, *columns) = len(keys) // shape[0], shape
            return dict.fromkeys(keys, (rows // each, *columns))
        rows, *columns = shape
        lengths = (
            [h * config.head_dim for h in _heads(config)] if ".qkv." in ours else [rows // 2] * 2
        )
        return {k: (n, *columns) for k, n in zip(keys, lengths, strict=True)}

    def recognises(self, key: str) -> bool:
        """Whether a key, without prefix, can belong to this layout."""
        return self._pattern.fullmatch(key) is not None

    @property
    def _pattern(self) -> re.Pattern[str]:
        names = (
            re.escape(t)
            .replace(r"\{i\}", r"\d+")
            .replace(r"\{e\}", r"\d+")
            .replace(r"\{p\}", "[qkv]")
            .replace(r"\{g\}", "(?:gate|up)")
            for t in self.names.values()
        )
        return re.compile(f"(?:{'|'.join(names)})(?:\\.weight|\\.bias|\\.weight_scale)?")


def split_of(ours: str) -> Split:
    """Returns how ranks cut our parameter."""
    return SPLITS.get(re.sub(r"^blocks\.\d+\.", "", ours), WHOLE)


def sections(ours: str, config: ModelConfig) -> tuple[int, ...] | None:
    """Returns the rows of each section of the whole parameter, None if it is cut as one."""
    kind = split_of(ours).sections
    if kind == "qkv":
        return tuple(h * config.head_dim for h in _heads(config))
    return (config.ffn,) * 2 if kind == "halves" and config.activation != "gelu" else None


def _heads(config: ModelConfig) -> tuple[int, int, int]:
    return config.num_heads, config.num_kv_heads, config.num_kv_heads


def _blocks(prefix: str, attention: str, extra: dict[str, str] | None = None) -> dict[str, str]:
    """Returns Megatron's names of a layer's modules, used by all layouts but transformers'."""
    names = {
        "input_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.qkv": f"{attention}.query_key_value",
        "attention.out": f"{attention}.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        **(extra or {}),
    }
    return {f"blocks.{{i}}.{ours}": f"{prefix}.{{i}}.{t}" for ours, t in names.items()}


def _same(*names: str) -> tuple[Field, ...]:
    """Returns fields written as 'ours=theirs'."""
    return tuple(Field(ours, (theirs,)) for ours, theirs in (n.split("=") for n in names))


_SAT_FIELDS = (
    *_same("num_layers=num_layers", "hidden=hidden_size", "num_heads=num_attention_heads"),
    *_same("vocab=vocab_size", "max_length=max_sequence_length"),
    Field("ffn", ("inner_hidden_size",), 0),
    Field("norm_eps", ("layernorm_epsilon",), 1e-5),
)
_SAT = {
    "embedding": "transformer.word_embeddings.weight",
    "final_norm": "transformer.final_layernorm",
    **_blocks("transformer.layers", "attention"),
}
_DEEPNORM = {
    "norm": "layer",
    "placement": "deepnorm",
    "qk_layer_scaling": True,
    "rope_float16": True,
}
_CHATGLM = {**_DEEPNORM, "activation": "gelu", "positions": "rope_2d", "tied_head": False}
_HF = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm",
    **{
        f"blocks.{{i}}.{ours}": f"model.layers.{{i}}.{theirs}"
        for ours, theirs in {
            "input_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "attention.qkv": "self_attn.{p}_proj",
            "attention.out": "self_attn.o_proj",
            "mlp.up": "mlp.gate_up_proj",
            "mlp.down": "mlp.down_proj",
        }.items()
    },
}
_HF_FIELDS = (  # defaults: transformers' GlmConfig and Glm4Config
    Field("num_layers", ("num_hidden_layers",), 40),
    Field("hidden", ("hidden_size",), 4096),
    Field("num_heads", ("num_attention_heads",), 32),
    Field("num_kv_heads", ("num_key_value_heads",), 2),
    Field("head_dim", ("head_dim",), 128),
    Field("ffn", ("intermediate_size",), 13696),
    Field("vocab", ("vocab_size",), 151552),
    Field("max_length", ("max_position_embeddings",), 131072),
    Field("norm_eps", ("rms_norm_eps",), 1.5625e-7),
    Field("qkv_bias", ("attention_bias",), True),
    Field("tied_head", ("tie_word_embeddings",), False),
)
_HF_REQUIRED = {"hidden_act": ("silu", "swish")}
_SWIGLU = {
    "norm": "rms",
    "activation": "swiglu",
    "positions": "rope",
    "rope_interleaved": True,
    "linear_bias": False,
}

_OTHERS = (
    *("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm"),
    *("attention.q_norm", "attention.k_norm", "attention.q_a_norm", "attention.kv_a_norm"),
    *("attention.kv_b", "mlp.router", "embedding_norm", "hidden_norm", "join", "final_norm"),
)
"""the modules of a block beside those that are quantized"""


def _experts(name: str, about: str, *, latent: bool, fused: bool) -> Layout:
    """Returns a layout of transformers' models with experts."""
    own = expert_names.LATENT_FIELDS if latent else expert_names.GROUPED_FIELDS
    kind = name.removesuffix("_fused")
    architecture = "Glm4MoeLiteForCausalLM" if latent else "Glm4MoeForCausalLM"
    return Layout(
        name=name,
        about=about,
        names={k: v for k, v in _HF.items() if "{i}" not in k} | expert_names.names(latent, fused),
        qkv="separate",
        ignored=rf"(.*\.)?inv_freq|{expert_names.COPIES}",
        fields=tuple(Field(o, tuple(t.split()), d) for o, t, d in (*expert_names.FIELDS, *own)),
        rope_table=True,
        rope_share=1.0 if latent else 0.5,
        fixed={**_SWIGLU, "placement": "pre", **({} if latent else {"rope_interleaved": False})},
        required=expert_names.REQUIRED,
        header={"architectures": [architecture], "model_type": kind},
    )


LAYOUTS = (
    Layout(
        name="glm",
        about="transformers' Glm: GLM-4-9B and its relatives",
        names=_HF,
        qkv="separate",
        fields=_HF_FIELDS,
        rope_table=True,
        fixed={**_SWIGLU, "placement": "pre"},
        required=_HF_REQUIRED,
        header={"architectures": ["GlmForCausalLM"], "model_type": "glm"},
    ),
    Layout(
        name="glm4",
        about="transformers' Glm4: GLM-4-0414",
        names={
            **_HF,
            "blocks.{i}.post_attention_norm": "model.layers.{i}.post_self_attn_layernorm",
            "blocks.{i}.post_mlp_norm": "model.layers.{i}.post_mlp_layernorm",
        },
        qkv="separate",
        fields=_HF_FIELDS,
        rope_table=True,
        fixed={**_SWIGLU, "placement": "sandwich"},
        required=_HF_REQUIRED,
        header={"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"},
    ),
    _experts("glm4_moe", "GLM-4.5, GLM-4.6 and GLM-4.7", latent=False, fused=False),
    _experts("glm4_moe_fused", "the same, all experts in one tensor", latent=False, fused=True),
    _experts("glm4_moe_lite", "GLM-4.7-Flash", latent=True, fused=False),
    _experts("glm4_moe_lite_fused", "the same, all experts in one tensor", latent=True, fused=True),
    Layout(
        name="chatglm2",
        about="ChatGLM2, ChatGLM3 and GLM-4 in their authors' code",
        names={
            "embedding": "transformer.embedding.word_embeddings.weight",
            "head": "transformer.output_layer.weight",
            "final_norm": "transformer.encoder.final_layernorm",
            **_blocks("transformer.encoder.layers", "self_attention"),
        },
        qkv="blocks",
        quantized=True,
        fields=(
            *_same("num_layers=num_layers", "hidden=hidden_size", "num_heads=num_attention_heads"),
            *_same("head_dim=kv_channels", "ffn=ffn_hidden_size", "vocab=padded_vocab_size"),
            *_same("max_length=seq_length", "norm_eps=layernorm_epsilon"),
            Field("num_kv_heads", ("multi_query_group_num",), 0),
            Field("qkv_bias", ("add_qkv_bias",), False),
            Field("rope_base", ("rope_ratio",), 1.0, unit=10000.0),
        ),
        fixed={**_SWIGLU, "placement": "pre", "rope_fraction": 0.5, "tied_head": False},
        required={
            "rmsnorm": True,
            "apply_residual_connection_post_layernorm": False,
            "post_layer_norm": True,
            "add_bias_linear": False,
            "multi_query_attention": True,
            "original_rope": True,
            "tie_word_embeddings": False,
        },
        left_out={"multi_query_attention": False},
        header={"architectures": ["ChatGLMModel"], "model_type": "chatglm"},
    ),
    Layout(
        name="glm-130b",
        about="GLM-130B, SwissArmyTransformer shards",
        names=_SAT,
        qkv="heads",
        sharded=True,
        quantized=True,
        fields=_SAT_FIELDS,
        fixed={**_DEEPNORM, "activation": "geglu", "positions": "rope"},
        required={"layernorm_order": "post", "position_encoding_2d": False},
        header={"model_class": "GLM130B"},
    ),
    Layout(
        name="chatglm-6b",
        about="ChatGLM-6B in its authors' code",
        names={**_SAT, "head": "lm_head.weight"},
        qkv="heads",
        quantized=True,
        fields=_SAT_FIELDS,
        fixed=_CHATGLM,
        required={"position_encoding_2d": True},
        header={"architectures": ["ChatGLMModel"], "model_type": "chatglm"},
    ),
    Layout(
        name="sat-chatglm-6b",
        about="ChatGLM-6B, SwissArmyTransformer shards",
        names={**_SAT, "head": "mixins.chatglm-final.lm_head.weight"},
        qkv="blocks",
        sharded=True,
        fields=_SAT_FIELDS,
        fixed=_CHATGLM,
        required={"layernorm_order": "post", "position_encoding_2d": True},
        header={"model_class": "ChatGLMModel"},
    ),
    Layout(
        name="glm-block",
        about="the original GLM (base, large, 10B), DeepSpeed or transformers",
        names={
            "embedding": "word_embeddings.weight",
            "final_norm": "transformer.final_layernorm",
            "position_embedding": "transformer.position_embeddings.weight",
            "block_embedding": "transformer.block_position_embeddings.weight",
            **_blocks("transformer.layers", "attention"),
        },
        qkv="blocks",
        sharded=True,
        prefixes=("", "glm.", "model.", "module."),
        fields=(
            *_same("num_layers=num_layers", "hidden=hidden_size", "num_heads=num_attention_heads"),
            *_same("vocab=vocab_size", "max_length=max_sequence_length"),
            Field("ffn", ("inner_hidden_size",), 0),
        ),
        fixed={
            "norm": "layer",
            "placement": "pre",
            "activation": "gelu",
            "positions": "learned_2d",
        },
        required={
            "block_position_encoding": True,
            "relative_encoding": False,
            "attention_scale": 1.0,
            "layernorm_epsilon": 1e-5,
        },
        header={"architectures": ["GLMModel"], "model_type": "glm"},
    ),
    Layout(
        name="glm-core",
        about="our own names; also the float32 masters in the checkpoint of a run",
        names={
            **{n: n for n in ("embedding", "head", "position_embedding", "block_embedding")},
            "final_norm": "final_norm",
            **{
                f"blocks.{{i}}.{n}": f"blocks.{{i}}.{n}"
                for n in (*QUANTIZED, *_OTHERS, f"{HEADS}.keys", f"{HEADS}.values")
            },
        },
        qkv="blocks",
        quantized=True,
        prefixes=("", "master."),
        training_state=r"(exp_avg|exp_avg_sq|rng)\..*",
        fields=tuple(Field(f.name, (f.name,), f.default) for f in dataclasses.fields(ModelConfig)),
        header={"model_type": "glm-core"},
    ),
)
"""where two layouts recognise the same keys, the earlier one is used"""


def find_layout(name: str) -> Layout:
    """Returns the layout of this name. Raises CheckpointError for an unknown one."""
    known = {item.name: item for item in LAYOUTS}
    if name not in known:
        raise CheckpointError(unknown("layout", name, known))
    return known[name]


def detect(keys: set[str]) -> tuple[Layout, str] | None:
    """Returns the layout and prefix that recognise most of the keys, None if no key is
    recognised."""
    candidates = [(item, prefix) for item in LAYOUTS for prefix in item.prefixes]
    counts = [len(recognised(*c, keys)) for c in candidates]
    best = max(counts)
    return candidates[counts.index(best)] if best else None


def recognised(item: Layout, prefix: str, keys: set[str]) -> set[str]:
    """Returns the keys, with this prefix, that can belong to a layout."""
    return {k for k in keys if k.startswith(prefix) and item.recognises(k[len(prefix) :])}
