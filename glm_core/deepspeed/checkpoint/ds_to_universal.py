"""Converts a checkpoint of one model-parallel rank, ours or DeepSpeed's, to the universal layout:
`python -m glm_core.deepspeed.checkpoint.ds_to_universal --input_folder ... --output_folder ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from glm_core.deepspeed.checkpoint import layouts, universal_checkpoint


def main(words: list[str] | None = None) -> None:
    """Runs DeepSpeed's command with its options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_folder", type=Path, required=True, help="the folder of one tag")
    parser.add_argument("--output_folder", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(words)
    universal_checkpoint.write(layouts.read(args.input_folder, 0, []), args.output_folder)


if __name__ == "__main__":
    main()
