"""Records anew what real DeepSpeed does with the scripts of this folder, into witness/.

    python tests/deepspeed/record.py

It needs `.venv-deepspeed` (`make deepspeed`) and takes a minute or two."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))
# most hosts have AVX2 and no more
os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")

import witness
from peer_runs import LACK, SCRIPTS, SCRIPTS_4
from real_deepspeed import CONFIG_SOURCES, Live, saver_sources, sources


def record(live: Live) -> None:
    """Runs everything, then replaces every file of the witness."""
    report, checkpoints = live.report(), live.checkpoints
    origin = {
        **report.pop("versions"),
        "instructions": "AVX2",
        "recorded": datetime.date.today().isoformat(),
    }
    witness.FOLDER.mkdir(exist_ok=True)
    for path in witness.FOLDER.iterdir():
        path.unlink()
    witness.write("config", CONFIG_SOURCES, origin, {"report": report})
    for script in [*SCRIPTS, *SCRIPTS_4]:
        facts = {"ranks": witness.pack_ranks(live.ranks(script))}
        witness.write(script, sources(script), origin, facts)
    digest = witness.write_archive(checkpoints, witness.ARCHIVE)
    witness.write("checkpoints", saver_sources(), origin, {"sha256": digest})


if __name__ == "__main__":
    if LACK:
        sys.exit(LACK)
    with tempfile.TemporaryDirectory() as folder:
        record(Live(Path(folder)))
