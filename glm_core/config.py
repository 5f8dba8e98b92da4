"""Defines what a run is: frozen dataclasses, validated on construction, read from and written to
TOML."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from glm_core.errors import ConfigError, unknown
from glm_core.versions import tomllib

Dtype = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")


def positive(names: str) -> dict[str, Any]:
    """Returns rules for `check`: each of these fields must be greater than zero."""
    return dict.fromkeys(names.split())


def divisors(n: int) -> str:
    """Returns the divisors of n as text, '1, 2, 4' for 4; for a large n only those up to 4096."""
    return ", ".join(str(d) for d in range(1, min(n, 4096) + 1) if n % d == 0)


def check(config: Any, *rules: dict[str, Any]) -> None:
    """Raises one ConfigError that lists every broken rule, at most one per field. A rule is True if
    it holds, the text that says why not, or None for "must be positive"."""
    bad: dict[str, str] = {}
    for key, rule in (item for table in rules for item in table.items()):
        value = getattr(config, key)
        if rule is None:
            finite = " and finite" if isinstance(value, float) else ""
            rule = 0 < value < math.inf or "must be positive" + finite
        if rule is not True:
            fact = f".{rule}" if dataclasses.is_dataclass(value) else f"={value} {rule}"
            bad.setdefault(key, key + fact)
    for name, hint in typing.get_type_hints(type(config)).items():
        allowed = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if allowed and getattr(config, name) not in allowed:
            known = ", ".join(map(str, allowed))
            bad[name] = f"{name} must be one of {known}; received {getattr(config, name)!r}"
    if bad:
        raise ConfigError(f"{type(config).__name__}: " + "; ".join(bad.values()))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of one GLM. Field names follow the papers, sizes the published
    checkpoints."""

    num_layers: int = 4
    hidden: int = 128
    """width D"""
    num_heads: int = 4
    """H"""
    num_kv_heads: int = 0
    """K; 0 = num_heads"""
    head_dim: int = 0
    """E; 0 = hidden / num_heads"""
    ffn: int = 512
    """inner width F of the feed-forward part (of one half, for the gated kinds)"""
    vocab: int = 4096
    """V, including padding"""
    max_length: int = 512
    """longest sequence in tokens; the size of learned position tables, otherwise only a limit"""
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    placement: Literal["pre", "deepnorm", "sandwich"] = "deepnorm"
    activation: Literal["gelu", "geglu", "swiglu"] = "geglu"
    """gelu: the tanh form, not gated (GLM, ChatGLM-6B); geglu: gated by the second half (erf form);
    swiglu: gated by the first half"""
    positions: Literal["learned_2d", "rope", "rope_2d"] = "rope"
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    """share of the head dimension that is rotated (0.5 in ChatGLM2 and later)"""
    rope_interleaved: bool = False
    """rotate pairs (2i, 2i+1) instead of (i, i + d/2)"""
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    """how the frequencies are stretched for texts longer than those the model was trained with"""
    rope_factor: float = 1.0
    """by how much they are stretched, with `rope_scaling`"""
    rope_original_length: int = 0
    """tokens the model was trained with before it was stretched; with scaling, 0 = max_length"""
    rope_attention_factor: float = 1.0
    """YaRN's factor on cos and sin"""
    rope_score_factor: float = 1.0
    """YaRN's factor on the scores of latent attention (DeepSeek's mscale, squared)"""
    rope_low_rotations: float = 1.0
    """pairs that turn less often over the original length are stretched whole (YaRN's beta_slow,
    Llama 3's low_freq_factor)"""
    rope_high_rotations: float = 32.0
    """pairs that turn more often are not stretched (YaRN's beta_fast, Llama 3's
    high_freq_factor)"""
    rope_truncate: bool = True
    """whether YaRN's ramp begins and ends at whole pairs"""
    rope_float16: bool = False
    """round the frequencies to float16, as the authors' code of GLM-130B and ChatGLM-6B does"""
    linear_bias: bool = True
    """biases on attention output and feed-forward"""
    qkv_bias: bool = True
    tied_head: bool = True
    qk_norm: bool = False
    """RMS norm of every head of q and k before the rotation (GLM-4.5 and later)"""
    kv_latent: int = 0
    """width of the latent that keys and values are made from; 0 = no latent attention. With it
    `head_dim` is that of q and k, and `qkv_bias` stands for biases on the two products down to the
    latents and on the output (GLM-4.7-Flash: 512)"""
    q_latent: int = 0
    """width of the latent that queries are made from; 0 = they are made from the hidden state"""
    rope_head_dim: int = 0
    """rotated dimensions at the end of a head of latent attention; all heads share the keys'"""
    value_head_dim: int = 0
    """a value head's size in latent attention; 0 = head_dim"""
    num_experts: int = 0
    """experts of a sparse layer that the router chooses from; 0 = every layer is dense"""
    experts_per_token: int = 0
    """experts that the router chooses for a token"""
    expert_ffn: int = 0
    """inner width of one expert"""
    num_shared_experts: int = 0
    """experts that every token passes, fused into one"""
    num_dense_layers: int = 0
    """dense layers before the first sparse one"""
    expert_groups: int = 1
    """groups of experts; the router keeps `top_groups` of them for a token"""
    top_groups: int = 1
    expert_scale: float = 1.0
    """factor on the weights of a token's experts"""
    normalize_experts: bool = True
    """whether a token's weights are divided by their sum"""
    balance_weight: float = 0.0
    """weight of the auxiliary loss that evens the experts' loads within a sequence, in training
    (GLM-4.5: 0.0001); 0 = off"""
    num_mtp_layers: int = 0
    """layers after the last one, each of which predicts one token further ahead"""
    mtp_weight: float = 0.3
    """weight of the further tokens' loss in training (GLM-4.5: 0.3, at the end 0.1)"""
    qk_layer_scaling: bool = False
    """divide scores by the layer's number, and multiply them by it after the mask (GLM-130B,
    ChatGLM-6B)"""
    pb_relax: float = 0.0
    """alpha of CogView's PB-relax; 0 = off"""
    embedding_gradient_shrink: float = 1.0
    """alpha of GLM-130B's embedding gradient shrink; 1 = off"""
    init_std: float = 0.02

    def __post_init__(self) -> None:
        derived = not self.head_dim
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if derived:
            object.__setattr__(self, "head_dim", self.hidden // max(self.num_heads, 1))
        if self.kv_latent and not self.value_head_dim:
            object.__setattr__(self, "value_head_dim", self.head_dim)
        sizes = "num_layers hidden num_heads num_kv_heads head_dim ffn vocab max_length"
        if self.rope_scaling != "none" and not self.rope_original_length:
            object.__setattr__(self, "rope_original_length", self.max_length)
        check(
            self,
            positive(f"{sizes} rope_attention_factor"),
            self._expert_rules() if self.num_experts else self._dense_rules(),
            self._latent_rules(),
            {
                "num_heads": not derived
                or self.hidden % max(self.num_heads, 1) == 0
                or f"does not divide hidden={self.hidden}; give head_dim or use a divisor",
                "num_kv_heads": self.num_heads % max(self.num_kv_heads, 1) == 0
                or f"does not divide num_heads={self.num_heads}; use {divisors(self.num_heads)}",
                "head_dim": self._rotary_rule(),
                "rope_fraction": 0 < self.rope_fraction <= 1 or "must lie in (0, 1]",
                "norm_eps": 0 < self.norm_eps < math.inf or "must be positive",
                "rope_base": 1 < self.rope_base < math.inf or "must be greater than 1",
                "rope_original_length": self.rope_original_length >= 0 or "must not be negative",
                "rope_factor": 1 <= self.rope_factor < math.inf or "must be at least 1",
                "rope_high_rotations": 0 < self.rope_low_rotations < self.rope_high_rotations
                or f"must exceed rope_low_rotations={self.rope_low_rotations}, which is positive",
                "init_std": 0 <= self.init_std < math.inf or "must not be negative",
                "embedding_gradient_shrink": 0 <= self.embedding_gradient_shrink <= 1
                or "must lie in [0, 1]",
                "num_mtp_layers": self.num_mtp_layers >= 0 or "must not be negative",
                "mtp_weight": 0 <= self.mtp_weight < math.inf or "must not be negative",
                "pb_relax": 0 <= self.pb_relax < math.inf or "must be 0 (off) or positive",
                "placement": (self.placement, self.norm)
                not in {("deepnorm", "rms"), ("sandwich", "layer")}
                or f"is not defined with norm={self.norm!r}; "
                "deepnorm goes with layer, sandwich with rms",
            },
        )

    def _expert_rules(self) -> dict[str, Any]:
        """Returns the rules of `check` for sparse layers."""
        n, g = self.num_experts, max(self.expert_groups, 1)
        each = n // g
        left = self.top_groups * each
        groups = f"top_groups={self.top_groups} of {g} groups of {each}"
        return {
            **positive("num_experts expert_ffn"),
            "expert_groups": (self.expert_groups > 0 and n % g == 0 and each >= 2)
            or f"must divide num_experts={n} into groups of 2 or more",
            "top_groups": 0 < self.top_groups <= g or f"must lie in 1 ... expert_groups={g}",
            "experts_per_token": 0 < self.experts_per_token <= left
            or f"must lie in 1 ... {left}: {groups} experts are left to choose from",
            "num_dense_layers": 0 <= self.num_dense_layers <= self.num_layers
            or f"must lie in 0 ... num_layers={self.num_layers}",
            "num_shared_experts": self.num_shared_experts >= 0 or "must not be negative",
            "balance_weight": 0 <= self.balance_weight < math.inf or "must not be negative",
            "expert_scale": 0 < self.expert_scale < math.inf or "must be positive",
            "activation": self.activation != "gelu"
            or "is not gated, and experts are; use swiglu or geglu",
        }

    def _dense_rules(self) -> dict[str, Any]:
        """Returns the rules of `check` for a model without experts."""
        names = "experts_per_token expert_ffn num_shared_experts num_dense_layers balance_weight"
        return {n: not getattr(self, n) or "needs num_experts" for n in names.split()}

    def _latent_rules(self) -> dict[str, Any]:
        """Returns the rules of `check` for latent attention, or for attention without it."""
        if not self.kv_latent:
            names = ("q_latent", "rope_head_dim", "value_head_dim")
            scored = {"rope_score_factor": self.rope_score_factor == 1 or "needs kv_latent"}
            return {n: not getattr(self, n) or "needs kv_latent" for n in names} | scored
        return {
            **positive("kv_latent value_head_dim"),
            "q_latent": self.q_latent >= 0 or "must not be negative",
            "rope_head_dim": 0 < self.rope_head_dim < self.head_dim
            or f"must lie in 1 ... head_dim - 1 = {self.head_dim - 1}",
            "rope_fraction": self.rope_fraction == 1
            or "must be 1 with kv_latent: rope_head_dim says it",
            "num_kv_heads": self.num_kv_heads == self.num_heads
            or f"must be num_heads={self.num_heads} with kv_latent",
            "rope_score_factor": self.rope_score_factor == 1
            or (1 < self.rope_score_factor < math.inf and self.rope_scaling == "yarn")
            or "must be at least 1, and more needs rope_scaling=yarn",
            "positions": self.positions == "rope" or "must be rope with kv_latent",
            "qk_norm": not self.qk_norm or "is not defined with kv_latent",
        }

    @property
    def key_heads(self) -> int:
        """Returns the heads that the cache holds of a token: one with latent attention."""
        return 1 if self.kv_latent else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        """Returns the size of a head in the cache. With latent attention it is the latent, which
        stands for keys and values both, and the rotated part of the key."""
        return self.kv_latent + self.rope_head_dim if self.kv_latent else self.head_dim

    @property
    def cache_parts(self) -> int:
        """Returns the tensors that the cache holds of a layer: keys and values, or latents only."""
        return 1 if self.kv_latent else 2

    @property
    def rotary_dim(self) -> int:
        """Returns the rotated dimensions of a head per position row. An odd number is rotated in
        pairs as the even one above it, as transformers does."""
        rows = 2 if self.positions == "rope_2d" else 1
        return int(self._rotated_part * self.rope_fraction) // rows

    @property
    def _rotated_part(self) -> int:
        """Returns the part of a head of which `rope_fraction` is rotated."""
        return self.rope_head_dim if self.kv_latent else self.head_dim

    def _rotary_rule(self) -> bool | str:
        """Returns the rule of `check` for the rotated dimensions."""
        if self.positions == "learned_2d" or not 0 < self.rope_fraction <= 1:
            return True
        dim, rows = self.rotary_dim, 2 if self.positions == "rope_2d" else 1
        fits = dim and rows * (dim + dim % 2) <= self._rotated_part
        if not fits or (rows == 2 and int(self.head_dim * self.rope_fraction) % 4):
            return f"gives {dim} rotated dimensions; they must be even"
        if self.rope_scaling != "none" and (rows == 2 or dim % 2 or dim < 4):
            return (
                f"gives {dim} rotated dimensions in {rows} position rows; "
                f"rope_scaling={self.rope_scaling} needs one row of an even number, 4 or more"
            )
        return True


def require_dense(config: ModelConfig, subject: str) -> None:
    """Raises ConfigError for a model with experts, latent attention, norms of the heads or
    multi-token prediction, which the subject cannot do."""
    names = ("num_experts", "kv_latent", "qk_norm", "num_mtp_layers")
    if found := [f"{n}={getattr(config, n)}" for n in names if getattr(config, n)]:
        raise ConfigError(
            f"{subject}: not possible with {', '.join(found)}; use a model without, for example "
            "glm-4-9b"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text is used, for which objective, and how it is packed."""

    path: str = ""
    """text file, JSONL file or folder; empty = the machine's own documentation"""
    text_key: str = "text"
    """the field of a JSONL line that holds the text"""
    vocab: int = 4096
    """sentencepiece vocabulary, including special tokens"""
    length: int = 128
    """tokens per sequence, L"""
    gmask_prob: float = 0.7
    """share of sequences whose samples are a prefix followed by one [gMASK] (GLM-130B: 0.7)"""
    sentence_prob: float = 0.0
    """share of sequences with [sMASK] sentence spans; the rest have [MASK] token spans"""
    mask_ratio: float = 0.15
    """share of the text's tokens inside [MASK] / [sMASK] spans"""
    span_mean: float = 3.0
    """mean of the Poisson distribution of token-span lengths"""
    min_gmask_ratio: float = 0.2
    """smallest share of a [gMASK] sample that is generated"""
    samples_per_sequence: int = 4
    """[MASK] or [sMASK] samples packed into one sequence, or more if they are short (GLM-130B:
    4)"""

    def __post_init__(self) -> None:
        ratios = ["gmask_prob", "sentence_prob", "mask_ratio", "min_gmask_ratio"]
        check(
            self,
            positive("vocab length samples_per_sequence"),
            {k: 0 <= getattr(self, k) <= 1 or "must lie in [0, 1]" for k in ratios},
            {
                "sentence_prob": self.gmask_prob + self.sentence_prob <= 1
                or f"plus gmask_prob={self.gmask_prob} exceeds 1",
                "length": self.length >= 16 or "must be at least 16",
                "span_mean": 0 < self.span_mean < math.inf or "must be positive",
            },
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimizer, schedule, precision and bookkeeping of one run."""

    backend: str = "cpu"
    strict: bool = False
    """an op without a kernel is an error instead of falling back to its reference"""
    exact: bool = False
    """sums in an order that depends on their length alone, gradients by a fixed tree over the
    sequences (docs/exact.md); backend cpu, or cuda in float32"""
    dtype: Dtype = "float32"
    """working dtype; below float32 the optimizer keeps float32 master weights"""
    seed: int = 0
    steps: int = 200
    micro_batch: int = 4
    """sequences per forward pass; by default half of a step's, since faults in how gradients are
    summed show from two micro-batches on"""
    global_batch: int = 8
    """sequences per optimizer step, at the end of the ramp"""
    ramp_from: int = 0
    """first global batch; 0 = no ramp"""
    ramp_increment: int = 0
    ramp_samples: int = 0
    """samples over which the global batch grows (GLM-130B: +24 over 5 493 164 samples)"""
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """limit of the global gradient norm; 0 = no clipping"""
    balance_rate: float = 1e-3
    """step of the bias by which a router evens its experts' loads (GLM-4.5: 0.001); 0 = the bias
    stays. Without experts it does nothing"""
    loss_scale: float = 65536.0
    """initial dynamic loss scale, float16 only"""
    loss_scale_window: int = 2000
    loss_scale_hysteresis: int = 2
    save_every: int = 0
    """steps between checkpoints; 0 = only at the end"""
    keep: int = 2
    """number of checkpoints kept"""
    compile: bool = False
    """run the model through torch.compile(model, fullgraph=True)"""
    graph: bool = False
    """record forward and backward of a micro-batch once as a graph of the device, and replay it;
    cuda and rocm, one process"""
    offload_optimizer: bool = False
    """keep masters and moments in main memory and update them there; nothing changes on the CPU"""

    def __post_init__(self) -> None:
        m = max(self.micro_batch, 1)
        multiple = f"multiple of micro_batch={self.micro_batch}"
        grown = self.global_batch - self.ramp_from
        check(
            self,
            positive(
                "steps micro_batch global_batch keep loss_scale loss_scale_window "
                "loss_scale_hysteresis lr eps"
            ),
            {
                "global_batch": self.global_batch % m == 0 or f"is not a {multiple}",
                "ramp_from": (0 <= self.ramp_from <= self.global_batch and self.ramp_from % m == 0)
                or f"must be 0 (off) or a {multiple} up to global_batch={self.global_batch}",
                "ramp_increment": not self.ramp_from
                or (
                    self.ramp_increment > 0
                    and self.ramp_increment % m == grown % self.ramp_increment == 0
                )
                or f"must be a {multiple} that divides global_batch - ramp_from = {grown}",
                "ramp_samples": self.ramp_samples > 0
                or not self.ramp_from
                or "must be positive with ramp_from",
                "min_lr": 0 <= self.min_lr <= self.lr or f"must lie in [0, lr={self.lr}]",
                "beta1": 0 <= self.beta1 < 1 or "must lie in [0, 1)",
                "beta2": 0 <= self.beta2 < 1 or "must lie in [0, 1)",
            },
            {
                k: 0 <= getattr(self, k) < math.inf or "must not be negative"
                for k in ("weight_decay", "clip", "warmup_steps", "save_every", "balance_rate")
            },
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """What a run does about bad steps (training/policy.py); may change when the run is resumed."""

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """what to do about a loss or gradient norm that is not finite; float16 overflows are handled by
    the loss scale"""
    spike: Literal["off", "stop", "skip", "rollback"] = "off"
    """what to do about a loss far above the recent ones"""
    spike_sigma: float = 6.0
    """how far: standard deviations above the mean of the window (OLMo-core, SkipStepOptimizer:
    6)"""
    spike_window: int = 128
    """size of the window in steps; nothing counts as a spike before half of it is filled
    (OLMo-core: 128)"""
    limit: int = 5
    """bad steps, with no good step past the furthest of them, after which the run stops anyway"""

    def __post_init__(self) -> None:
        rule = self.spike_window > 3 or "must be at least 4"
        check(self, positive("spike_sigma limit"), {"spike_window": rule})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that determines a run; written beside its results as `config.toml`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        check(
            self,
            {
                "data": self.data.length <= self.model.max_length
                or f"length={self.data.length} exceeds model.max_length={self.model.max_length}",
                "model": self.model.vocab >= self.data.vocab
                or f"vocab={self.model.vocab} is smaller than data.vocab={self.data.vocab}",
            },
        )


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Builds a config from nested plain values. Raises one ConfigError for all unknown keys and
    wrong types."""
    hints = typing.get_type_hints(cls)
    strange: list[str] = []
    bad: list[str] = []
    built: dict[str, Any] = {}
    for key, value in values.items():
        path, hint = f"{where}{key}", hints.get(key)
        if hint is None:
            strange.append(unknown("key", path, [where + h for h in hints]))
        elif dataclasses.is_dataclass(hint):
            if isinstance(value, dict):
                try:
                    built[key] = from_dict(typing.cast(type[Any], hint), value, path + ".")
                except ConfigError as error:
                    bad.append(str(error))
            else:
                bad.append(f"{path}: expected a table, received {value!r}")
        else:
            # an integer that float64 holds exactly may stand for a float
            as_float = hint is float and type(value) is int and abs(value) < 1 << 53
            built[key] = float(value) if as_float else value
            kind = str if typing.get_origin(hint) is Literal else hint
            if isinstance(kind, type) and type(built[key]) is not kind:
                bad.append(f"{path}: expected {kind.__name__}, received {value!r}")
    if not bad:  # otherwise defaults would stand in for what could not be read
        try:
            config = cls(**built)
        except ConfigError as error:
            bad.append(str(error))
    if strange or bad:
        raise ConfigError("; ".join(strange + bad))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Returns plain nested values with every default resolved."""
    return dataclasses.asdict(config)


def load(path: str | Path) -> RunConfig:
    """Reads a TOML run file. Raises ConfigError that names the file, and the line or the bad
    keys."""
    try:
        return from_dict(RunConfig, tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass an existing TOML run file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def dumps(config: RunConfig) -> str:
    """Returns the resolved config as TOML, which `load` reads back equal."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            # JSON's escapes are TOML's, but for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return repr(value)

    return "\n".join(
        f"[{table}]\n" + "".join(f"{k} = {text(v)}\n" for k, v in values.items())
        for table, values in to_dict(config).items()
    )


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Applies overrides such as `train.steps=50`, typed by the field they name."""
    values = to_dict(config)
    for item in assignments:
        path, eq, raw = item.partition("=")
        table, _, key = path.partition(".")
        if not eq or not key:
            raise ConfigError(f"{item!r}: expected table.key=value, for example train.steps=50")
        if table not in values:
            raise ConfigError(unknown("table", table, values))
        try:
            parsed = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            parsed = raw
        values[table][key] = parsed
    return from_dict(RunConfig, values)
