"""Lists every formula of the planner with its source, for `plan --explain`."""

FORMULAS: tuple[tuple[str, str, str], ...] = (
    (
        "model FLOPs a sequence",
        "3 (l (2 s W + 4 s^2 H E) + 2 s h V), W the weights of a layer that a token passes: of X "
        "experts T",
        "Narayanan et al. 2021, appendix; Korthikanti et al. 2022, eq. 7; masked pairs count",
    ),
    (
        "hardware FLOPs a sequence",
        "model FLOPs + l (2 s W + 4 s^2 H E) with full recomputation, + l 4 s^2 H E with selective",
        "Korthikanti et al. 2022, eq. 8 and 9",
    ),
    (
        "MFU, HFU",
        "model or hardware FLOPs a step / (step seconds x chips x peak)",
        "Chowdhery et al. 2022, appendix B",
    ),
    (
        "weights, gradients, optimizer",
        "2 n, 4 n, 12 n bytes on a chip, n its parameters, of the experts 1/e; divided by d from "
        "ZeRO 3, 2, 1 on, experts by d/e",
        "Rajbhandari et al. 2020, section 3, with float32 gradients",
    ),
    (
        "activations a layer",
        "s b h (10 + 24/t + 5 a s/(h t)) bytes for F = 4h; / t with SP; last "
        "term 0 with selective recomputation or fused attention; 2 s b h with full",
        "Korthikanti et al. 2022, eq. 2 to 6, written for any F and gates",
    ),
    ("runtime", "2 GB a chip for context, buffers and fragmentation", "assumed"),
    (
        "micro-batches in flight",
        "min(m, p), times 1 + (p - 1)/(p v) when interleaved",
        "Narayanan et al. 2021, section 2.2",
    ),
    (
        "bubble",
        "(p - 1) / (v m + p - 1) of the step; p = n/t chips of a pipeline",
        "Narayanan et al. 2021, section 2.2; (n/t - 1)/(m + n/t - 1) on the GLM slides for v = 1",
    ),
    (
        "matrix products",
        "(m + (p - 1)/v) x FLOPs of a stage / (t peak) x factor",
        "Narayanan et al. 2021; factor fitted",
    ),
    (
        "elementwise",
        "bytes kept of a layer, written and read once in each pass, + 10 a s^2 b/t where "
        "scores are written; / memory bandwidth x factor",
        "own count; factor fitted",
    ),
    (
        "tensor parallel",
        "4 all-reduces a layer (6 with full recomputation) of 2 b s h bytes, "
        "2 (t - 1)/t of it sent",
        "Shoeybi et al. 2019, section 3; ring all-reduce",
    ),
    (
        "expert parallel",
        "4 all-to-alls of a sparse layer (6 with full recomputation) of 2 b s T h bytes, "
        "(e - 1)/e of it sent; every expert as many rows, none dropped",
        "Lepikhin et al. 2021 (GShard), section 3; own count of links",
    ),
    ("pipeline", "m x 4 b s h v / t bytes between stages", "Narayanan et al. 2021, section 4.1"),
    (
        "data parallel",
        "2 (d - 1)/d 4 n bytes a step, or 3 (d - 1)/d 2 n a micro-batch under "
        "ZeRO 3; a node's ranks share its links",
        "Rajbhandari et al. 2020, section 7",
    ),
    ("launches", "(m + (p - 1)/v) x layers x passes x fitted seconds", "fitted"),
    ("optimizer", "28 n bytes / memory bandwidth, / d from ZeRO 1 on", "own count"),
    (
        "factors",
        "least squares of the relative error over the fit rows, none below its floor",
        "`glm-core plan validate` lists rows, factors and floors",
    ),
    (
        "our own trainer",
        "2 n weights, 12 n masters and moments, under ZeRO 12 n / d in all; 2 n gradients, 4 n "
        "where micro-batches are summed; a layer keeps 2 T (4 D + 3 (H + K) E/t + (gates + 1) "
        "F/t) + statistics, with full recomputation 4 T D; tensors that a stage received and sent "
        "are kept for every micro-batch in flight",
        "glm_core/planner/rank_memory.py, held against `glm-core plan dry-run`",
    ),
    ("days, energy", "tokens / (global batch x s) steps; chips x power", "definition"),
)
