"""Searches with beams for the best continuations of one prompt, by GLM-130B's rules (THUDM/GLM-130B
generation/strategies.py, BeamSearchStrategy).

Shapes: N running beams, V vocabulary."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from glm_core.config import check, positive
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt
from glm_core.model.runner import DecodeRow, Runner

BANNED = -65504.0
"""a banned token's logit, as in GLM-130B; finite, so that a banned token can still come if nothing
else is left"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearch:
    """Settings of a beam search. The defaults are those of GLM-130B's scripts/generate.sh."""

    num_beams: int = 4
    max_tokens: int = 256
    """new tokens"""
    length_penalty: float = 1.0
    """score = sum of log-probabilities / ((5 + length) / 6)^length_penalty; length includes the
    prompt and the stop token"""
    no_repeat_ngram: int = 3
    """no n generated tokens in a row may be generated again (n-grams of the prompt may); 0 = off"""
    min_tokens: int = 0
    """new tokens before a stop token is allowed"""
    stop: tuple[int, ...] = ()
    """tokens that end a beam"""
    sample: bool = False
    """draw candidates by their probability, without replacement, instead of taking the most
    likely"""
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            self,
            positive("num_beams max_tokens"),
            {
                "no_repeat_ngram": self.no_repeat_ngram >= 0 or "must be 0 (off) or positive",
                "min_tokens": 0 <= self.min_tokens <= self.max_tokens
                or f"must lie in [0, max_tokens={self.max_tokens}]",
                "seed": 0 <= self.seed < 1 << 63 or "must lie in [0, 2^63)",
            },
        )


class Hypothesis(NamedTuple):
    """A finished continuation without its stop token, and its score under the length penalty."""

    tokens: list[int]
    score: float


class _Beam(NamedTuple):
    tokens: list[int]
    """the tokens generated so far"""
    score: float
    """sum of log-probabilities"""
    parent: int = 0
    """the slot whose cache holds all but the last token"""


def search(
    model: GLM | Runner, prompt: Prompt, settings: BeamSearch, num_ids: int | None = None
) -> list[Hypothesis]:
    """Returns at most `num_beams` hypotheses, best first. Beams that still run at max_tokens or at
    the end of the context are among them. num_ids: the tokenizer's vocabulary, if smaller than the
    model's. A Runner in place of the model brings its own cache, a slot for each beam. Raises
    PromptError, GenerationError."""
    runner = model if isinstance(model, Runner) else Runner(model, settings.num_beams)
    runner.require_room(prompt)
    generator = torch.Generator().manual_seed(settings.seed)
    size, ended, running = len(prompt.tokens), list[Hypothesis](), [_Beam([], 0.0)]
    logits = runner.prefill(0, [prompt])
    for step in range(min(settings.max_tokens, runner.length - size)):
        if step:
            parents = [b.parent for b in running]
            runner.cache.copy(parents, list(range(len(running))), size + step - 1)
            logits = runner.decode(
                [DecodeRow(b.tokens[-1], prompt, size + step - 1) for b in running]
            )
        logits = logits[:, : num_ids or model.config.vocab]
        if not torch.isfinite(logits).all():
            raise runner.explain(runner.last, step + 1)
        running = _advance(
            _banned(logits, prompt, running, settings), running, ended, settings, generator, size
        )
        best = max((_penalised(b.score, size + step + 1, settings) for b in running), default=None)
        if best is None or (len(ended) == settings.num_beams and ended[-1].score >= best):
            return ended
    for beam in running:
        _end(beam, ended, settings, size + len(beam.tokens))
    return ended


def _advance(
    scores: Tensor,
    running: list[_Beam],
    ended: list[Hypothesis],
    settings: BeamSearch,
    generator: torch.Generator,
    size: int,
) -> list[_Beam]:
    """Returns the beams that go on after logits [N, V], and adds those that end to `ended`."""
    vocab = scores.shape[-1]
    so_far = torch.tensor([b.score for b in running], device=scores.device)
    total = (torch.log_softmax(scores, -1) + so_far[:, None]).flatten()  # [N * V]
    going: list[_Beam] = []
    for place in _candidates(total, settings, generator):
        parent, token = divmod(place, vocab)
        beam = _Beam([*running[parent].tokens, token], float(total[place]), parent)
        if token in settings.stop:
            _end(beam._replace(tokens=beam.tokens[:-1]), ended, settings, size + len(beam.tokens))
        elif len(going) < settings.num_beams:
            going.append(beam)
        else:
            break
    return going


def _candidates(total: Tensor, settings: BeamSearch, generator: torch.Generator) -> list[int]:
    """Returns indices into the flat scores [N * V], best first, enough to keep all beams even if
    some end."""
    count = (max(1, len(settings.stop)) + 1) * settings.num_beams
    if settings.sample:
        probabilities = torch.softmax(total, -1).cpu()
        count = min(count, int(probabilities.count_nonzero()))
        drawn = torch.multinomial(probabilities, count, generator=generator)
        return drawn[total.cpu()[drawn].argsort(descending=True)].tolist()
    return total.topk(min(count, len(total))).indices.tolist()


def _banned(logits: Tensor, prompt: Prompt, running: list[_Beam], settings: BeamSearch) -> Tensor:
    """Returns the logits with early stop tokens and repeated n-grams banned."""
    n = settings.no_repeat_ngram
    for row, beam in enumerate(running):
        if len(beam.tokens) < settings.min_tokens:
            logits[row, list(settings.stop)] = BANNED
        text = [*prompt.tokens, *beam.tokens]
        if n and len(text) > n:
            last = text[len(text) - n + 1 :]
            bans = [
                text[i] for i in range(len(prompt.tokens), len(text)) if text[i - n + 1 : i] == last
            ]
            logits[row, bans] = BANNED
    return logits


def _penalised(score: float, length: int, settings: BeamSearch) -> float:
    """Returns the score under the length penalty; see BeamSearch.length_penalty."""
    return score / ((5 + length) / 6) ** settings.length_penalty


def _end(beam: _Beam, ended: list[Hypothesis], settings: BeamSearch, length: int) -> None:
    """Adds a finished beam to the best hypotheses so far."""
    ended.append(Hypothesis(beam.tokens, _penalised(beam.score, length, settings)))
    ended.sort(key=lambda h: -h.score)
    del ended[settings.num_beams :]
