"""Decides whether log probabilities deviate by more than honest rounding: by the size and the lean
of their deviations in groups of tokens, and by their likeness to known mistakes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from glm_core.align.statistics import EPS, critical_z
from glm_core.rollout.causes import Cause, Fit, fit
from glm_core.rollout.distribution import Draws
from glm_core.rollout.files import Array, Reply, per_token
from glm_core.rollout.ties import settled

FALSE_ALARM_RATE = 1e-3
DRAWS_SHARE = 0.25
"""share of this rate that is for whether the tokens can be draws"""
SAFETY_FACTOR = 2.0
"""a size or a lean may be this many times the largest of the controls"""
PEAK_FACTOR = 4.0
"""the same for the largest single deviation"""
FLOOR = 8 * EPS
"""deviation of a log probability that float32 arithmetic may always show"""
NUM_BINS = 6
LEAST_TOKENS = 48
"""tokens of the smallest group that is judged by itself"""
BLOCK = 8
"""tokens of a reply whose deviations count as one: they share keys and values"""
EXPLAINED = 0.5
"""a mistake that explains this share of the squared deviations is the cause"""
UNEVEN = 4.0
"""codes of few bits disturb all prompts alike: their groups differ by less than this factor"""
QUANTILES = (0.01, 0.5, 0.99)
Verdict = Literal["identical", "aligned", "diverged"]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One check; guilty where its ratio is above 1."""

    group: str
    statistic: str
    """`size` (mean square), `lean` (mean), `peak`, `likeness` to a known mistake, or `draws`"""
    effect: float
    allowed: float
    ratio: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """How two sets of log probabilities of the same tokens differ."""

    tokens: int
    equal: float
    """share of tokens whose log probabilities are the same to the bit"""
    mean: float
    """mean |d logprob|"""
    max: float
    k1: float
    """KL(sampler || trainer) estimated by the mean of -log r, r = trainer / sampler probability
    (Schulman 2020, Approximating KL divergence)"""
    k3: float
    """the same by the mean of r - 1 - log r, which is never negative"""
    ratio: tuple[float, ...]
    """QUANTILES of r, between its smallest and its largest value"""
    by_step: dict[int, float]
    """mean |d logprob| of each step"""


def figures(trainer: Array, sampler: Array, replies: Sequence[Reply]) -> Figures:
    """Returns the figures of a trainer's and a sampler's log probabilities."""
    d = trainer - sampler
    r = np.exp(np.clip(d, -700, 700))
    steps = per_token(replies)["step"]
    inner = np.quantile(r, QUANTILES)
    return Figures(
        tokens=d.size,
        equal=float((d == 0).mean()),
        mean=float(np.abs(d).mean()),
        max=float(np.abs(d).max()),
        k1=float(0.0 - d.mean()),
        k3=float((r - 1 - d).mean()),
        ratio=(float(r.min()), *map(float, inner), float(r.max())),
        by_step={int(s): float(np.abs(d[steps == s]).mean()) for s in np.unique(steps)},
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The verdict on one engine's log probabilities."""

    verdict: Verdict
    cause: str = ""
    """name of the known mistake; empty where none fits or nothing is wrong"""
    sentence: str = ""
    """what is wrong, in words; empty where nothing is"""
    begins: str = ""
    """the first step and place whose deviations are outside"""
    share: float = 0.0
    """largest ratio of all tests"""
    honest: float
    """largest mean |d logprob| of the controls"""
    mean: float
    """mean |d logprob| against the same base"""
    ties: int = 0
    """tokens that lie nearer to what another honest choice of experts gives"""
    tests: list[Check] = dataclasses.field(default_factory=list)
    """the guilty ones, worst first"""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)


def _groups(replies: Sequence[Reply], base: Array) -> dict[str, Array]:
    """Returns partitions of the tokens by name: the number of each token's group. None of them
    looks at the deviations."""
    facts = per_token(replies)
    found = {"all tokens": np.zeros(base.size, dtype=int)}
    for name in ("step", "cached", "repeated"):
        if len(np.unique(facts[name])) > 1:
            found[name] = np.unique(
                facts[name] > 0 if name == "cached" else facts[name], return_inverse=True
            )[1]
    for name, key in (
        ("place", facts["place"]),
        ("prompt length", facts["prompt"]),
        ("probability", base),
    ):
        edges = np.unique(np.quantile(key, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
        found[name] = np.searchsorted(edges, key, side="right")
    return found


def judge(
    reported: Array,
    base: Array,
    controls: Array,
    replies: Sequence[Reply],
    causes: Iterable[Cause] = (),
    others: Array | None = None,
    drawn: Draws | None = None,
    rate: float = FALSE_ALARM_RATE,
) -> Judgement:
    """Returns the verdict on reported log probabilities [tokens]. base: the correct ones; controls
    [controls, tokens]: what honest engines report; others: see Evidence; drawn: whether the tokens
    can be draws."""
    others = np.zeros((0, base.size)) if others is None else others
    raw, raw_honest = reported - base, controls - base
    d, honest = settled(raw, others), settled(raw_honest, others)
    known = list(causes)
    parts = _groups(replies, base)
    count = 2 * sum(len(np.unique(g)) for g in parts.values())
    count += sum(len(c.values) for c in known)
    z = critical_z((1 - DRAWS_SHARE) * rate, count)
    blocks = _blocks(replies)
    tests = [
        test
        for name, group in parts.items()
        for test in _group_tests(name, group, d, honest, blocks, z)
    ]
    peak = PEAK_FACTOR * float(np.abs(honest).max()) + FLOOR
    tests.append(
        Check("all tokens", "peak", float(np.abs(d).max()), peak, float(np.abs(d).max() / peak))
    )
    if drawn is not None:
        own_z = critical_z(DRAWS_SHARE * rate, len(drawn))
        for name, value in zip(drawn._fields, drawn, strict=True):
            tests.append(Check(name, "draws", value, own_z, abs(value) / own_z))
    fits = [(c, *_likeness(c, raw, raw_honest, others, blocks, z)) for c in known]
    tests += [test for _, _, test in fits]
    guilty = sorted((t for t in tests if t.ratio > 1), key=lambda t: -t.ratio)
    facts: dict[str, Any] = {
        "honest": float(np.abs(raw_honest).mean(1).max()),
        "mean": float(np.abs(raw).mean()),
        "share": max(t.ratio for t in tests),
        "ties": int((d != raw).sum()),
    }
    if not guilty:
        return Judgement(verdict="identical" if not raw.any() else "aligned", **facts)
    cause, sentence = _named(fits, d, honest, others, guilty, parts)
    return Judgement(
        verdict="diverged",
        cause=cause,
        sentence=sentence,
        begins=_begins(replies, d, honest),
        tests=guilty[:20],
        **facts,
    )


def _blocks(replies: Sequence[Reply]) -> Array:
    """Returns the number of each token's block: BLOCK tokens of one reply."""
    found, first = [], 0
    for r in replies:
        found.append(first + np.arange(len(r.tokens)) // BLOCK)
        first = int(found[-1][-1]) + 1
    return np.concatenate(found)


def _z(terms: Array, blocks: Array) -> float:
    """Returns a sum in its own standard errors, where a block is one term."""
    sums = np.bincount(blocks, terms)
    return float(abs(sums.sum()) / max(np.sqrt((sums**2).sum()), 1e-300))


def _group_tests(
    name: str, group: Array, d: Array, honest: Array, blocks: Array, z: float
) -> Iterable[Check]:
    for number in np.unique(group):
        inside = group == number
        if inside.sum() < LEAST_TOKENS:
            continue
        label = name if name == "all tokens" else f"{name}, part {number}"
        own, other = d[inside], honest[:, inside]
        size = float(np.sqrt((own**2).mean()))
        allowed = SAFETY_FACTOR * float(np.sqrt((other**2).mean(1)).max()) + FLOOR
        yield Check(label, "size", size, allowed, size / allowed)
        lean = float(abs(own.mean()))
        allowed = SAFETY_FACTOR * float(np.abs(other.mean(1)).max()) + FLOOR
        ratio = min(lean / allowed, _z(own, blocks[inside]) / z)
        yield Check(label, "lean", lean, allowed, ratio)


def _likeness(
    cause: Cause, d: Array, honest: Array, others: Array, blocks: Array, z: float
) -> tuple[Fit, Check]:
    """Returns the best fit of a cause, and the test of its gain: it must be beyond that of honest
    rounding, and carried by many blocks of tokens."""
    own = fit(cause, d, others)
    range_ = max(0.0, *(fit(cause, h, others).gain for h in honest)) + FLOOR**2 * d.size
    gain = max(own.gain, 0.0)
    # amplitudes, as the other tests: gains are squares
    effect, allowed = gain**0.5, SAFETY_FACTOR * range_**0.5
    without, left = settled(d, others), settled(d - own.deviation, cause.others)
    # honest rounding takes no side for or against what the mistake adds: the mean of this is zero
    terms = without * (without - left)
    # a few tokens that are far off and fit are as good as many that each fit a little
    certain = max(_z(terms, blocks) / z, gain / max(EXPLAINED * float(without @ without), 1e-300))
    return own, Check(cause.name, "likeness", effect, allowed, min(effect / allowed, certain))


def _named(
    fits: Sequence[tuple[Cause, Fit, Check]],
    d: Array,
    honest: Array,
    others: Array,
    guilty: Sequence[Check],
    parts: dict[str, Array],
) -> tuple[str, str]:
    """Returns name and sentence of the mistake that explains most, if it explains half of what
    rounding does not; else of one whose size alone fits; else empty texts."""
    beyond = float(d @ d) - float((honest**2).sum(1).mean())
    alike = [(f.gain, c, f) for c, f, t in fits if t.ratio > 1]
    if alike:
        gain, cause, best = max(alike, key=lambda entry: entry[0])
        if gain > EXPLAINED * beyond:
            return cause.name, cause.sentence.format(best.value)
    if all(t.statistic == "draws" for t in guilty):
        return "draws", "the tokens were not drawn from the distribution that the settings state"
    clear = float(d @ d) > SAFETY_FACTOR**2 * float((honest**2).sum(1).max())
    if not clear or _unevenness(d, parts) > UNEVEN:
        return "", ""
    sizes = {c.name: _distance(beyond, c, others) for c, _, _ in fits if c.noise}
    name = min(sizes, key=lambda n: sizes[n], default="")
    if not name or sizes[name] > np.log(UNEVEN):
        return "", ""
    return name, f"the deviations have the size that {name} give, everywhere alike"


def _distance(beyond: float, cause: Cause, others: Array) -> float:
    """Returns how far apart two sums of squares are, as the logarithm of their ratio."""
    own = float((settled(cause.deviations[0], others) ** 2).sum())
    return abs(float(np.log(beyond / max(own, 1e-300))))


def _unevenness(d: Array, parts: dict[str, Array]) -> float:
    """Returns the largest ratio of the deviations' sizes in two groups of one partition."""
    found = [1.0]
    for name in ("place", "prompt length", "cached"):
        group = parts.get(name)
        if group is not None:
            sizes = [float((d[group == g] ** 2).mean()) ** 0.5 for g in np.unique(group)]
            found.append(max(sizes) / max(min(sizes), 1e-300))
    return max(found)


def _begins(replies: Sequence[Reply], d: Array, honest: Array) -> str:
    """Returns the first step, and in it the first place, from which the deviations are outside of
    the controls' range."""
    facts = per_token(replies)
    limit = SAFETY_FACTOR * float(np.abs(honest).max()) + FLOOR
    outside = np.abs(d) > limit
    if not outside.any():
        return "no single token; only many together show it"
    step = facts["step"][outside].min()
    place = facts["place"][outside & (facts["step"] == step)].min()
    return f"step {step}, place {place}"
