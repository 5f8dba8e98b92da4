"""Converts a checkpoint of one model-parallel rank, ours or DeepSpeed's, to the universal layout:
`python -m glm_core.deepspeed.checkpoint.ds_to_universal --input_folder ... --output_folder ...`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from glm_core.deepspeed.checkpoint import layouts, universal_checkpoint


def main(words: list[str] | Any = None) -> None:
    """Runs DeepSpeed's command with its options: the command line's (None), a list of words, or an
    object whose attributes they are, as scripts pass it to DeepSpeed's `main`."""
    if words is not None and not isinstance(words, list):
        _convert(Path(words.input_folder), Path(words.output_folder))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_folder", type=Path, required=True, help="the folder of one tag")
    parser.add_argument("--output_folder", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(words)
    _convert(args.input_folder, args.output_folder)


def _convert(place: Path, out: Path) -> None:
    universal_checkpoint.write(layouts.read(place, 0, []), out)


if __name__ == "__main__":
    main()
