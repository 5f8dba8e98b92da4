"""Ends a forked process with what its work says."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def work_and_exit(log: Path, work: Callable[[], Any]) -> NoReturn:
    """Does the work of a forked process with its output in `log`, and ends the process: with 1 and
    a traceback where the work raises."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
