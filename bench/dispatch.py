"""Measures what dispatch costs, an op call through the active backend against the bare kernel:
`python -m glm_core.bench.dispatch`."""

from __future__ import annotations

import argparse
import json

from glm_core.measure.dispatch import overhead, samples
from glm_core.measure.timing import machine


def measure(rounds: int = 15) -> dict[str, object]:
    """Returns the microseconds that dispatch adds to one call, the median of `rounds`."""
    return overhead(*samples(rounds)) | {"machine": machine()}


def main() -> int:
    """Prints the result. Exits 1 where dispatch costs more than its limit."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.dispatch", description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure()
    text = "dispatch adds {overhead_us:.2f} us a call ({low_us:.2f} ... {high_us:.2f})"
    print(json.dumps(result) if args.json else text.format(**result))
    return int(result["overhead_us"] > result["limit_us"])  # type: ignore[operator]  # numbers


if __name__ == "__main__":
    raise SystemExit(main())
