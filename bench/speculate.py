"""Decodes with drafts of the layer of multi-token prediction, beside plain decoding, in turn:
`python -m glm_core.bench.speculate RUN`.

RUN is a training run whose model has such a layer. Prompts are beginnings of the text of `--text`.
The tokens must be the same; the figures are how many drafts were right, how many tokens a step
gave, and how much faster that was."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from glm_core.backends import registry
from glm_core.measure.timing import interleave, machine, ratio
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt
from glm_core.model.runner import Runner
from glm_core.model.sample import Sampling
from glm_core.pretrained.load import from_path

TEMPERATURES = {"greedy": 0.0, "sampled": 0.8}
ROUNDS = 5


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns the figures of each way to sample and number of drafts."""
    chat_model = from_path(args.run_folder)
    lines = [x for x in Path(args.text).read_text(encoding="utf-8").splitlines() if len(x) > 40]
    spaced = lines[:: max(len(lines) // args.prompts, 1)][: args.prompts]
    prompts = [chat_model.completion_prompt(x[:40]) for x in spaced]
    model = chat_model.model
    with registry.use("cpu"):
        rows = [
            measured(model, prompts, Sampling(max_tokens=args.tokens, temperature=t), drafts)
            | {"sampling": name}
            for name, t in TEMPERATURES.items()
            for drafts in args.drafts
        ]
    return {"machine": machine(), "prompts": len(prompts), "rows": rows}


def measured(model: GLM, prompts: list[Prompt], sampling: Sampling, drafts: int) -> dict[str, Any]:
    """Returns the figures of one setting. A turn continues every prompt."""
    plain, drafting = Runner(model, 1), Runner(model, 1, speculate=drafts)
    tokens: dict[str, list[list[int]]] = {}

    def turn(name: str, runner: Runner) -> None:
        tokens[name] = [generate(runner, [p], sampling)[0].tokens for p in prompts]

    took = interleave(
        {"plain": lambda: turn("plain", plain), "drafts": lambda: turn("drafts", drafting)},
        ROUNDS,
        warmup=1,
    )
    count, turns = sum(map(len, tokens["plain"])), ROUNDS + 1
    return {
        "drafts": drafts,
        "same_tokens": tokens["plain"] == tokens["drafts"],
        "tokens": count,
        "acceptance": drafting.accepted / max(drafting.drafted, 1),
        "tokens_a_step": count / (count - drafting.accepted / turns),
        "speed_up": ratio(took["plain"], took["drafts"]),
    }


def main() -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.speculate", description=__doc__)
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--text", required=True, metavar="FILE", help="prompts are its lines")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    print(json.dumps(run(parser.parse_args()), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
