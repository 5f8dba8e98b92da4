"""Is a backend right? Cases from the ops' own samples, judged against the float64 reference."""

from glm_core.conformance.case import MODES, Case, every_case, select
from glm_core.conformance.report import Report, Result
from glm_core.conformance.run import progress_line, run, run_case
from glm_core.conformance.tolerance import MAX_ERROR_RATIO

__all__ = [
    "MAX_ERROR_RATIO",
    "MODES",
    "Case",
    "Report",
    "Result",
    "every_case",
    "progress_line",
    "run",
    "run_case",
    "select",
]
