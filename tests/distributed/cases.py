"""Which plans are proved, on how many processes, and which mistakes the proof must find."""

from __future__ import annotations

from glm_core.sensitivity.plans.case import Case

HONEST = [
    Case("dp=2"),
    Case("dp=2,zero=1,micro_batches=2"),
    Case("dp=2,zero=2,micro_batches=2", "glm4"),
    Case("dp=2,zero=3,micro_batches=2"),
    Case("dp=2,zero=3,recompute=selective", "10b"),
    Case("tp=2", "glm4"),
    Case("tp=2,sp=true"),
    Case("tp=2,sp=true,micro_batches=2,recompute=full", "10b"),
    Case("pp=2,schedule=gpipe,micro_batches=4"),
    Case("pp=2,micro_batches=4", "10b"),
    Case("pp=2,schedule=interleaved,virtual=2,micro_batches=4,recompute=selective", "glm4"),
    Case("pp=2,schedule=zero-bubble,micro_batches=4", "10b"),
    Case("pp=2,schedule=zbv,virtual=2,micro_batches=4"),
    Case("tp=2,sp=true", dtype="bfloat16"),
    Case("pp=2,schedule=zero-bubble,micro_batches=4", dtype="bfloat16"),
    Case("dp=4,zero=3", dtype="bfloat16"),
    Case("dp=2,zero=2,micro_batches=4", dtype="bfloat16"),
    Case("tp=4,sp=true"),
    Case("pp=4,micro_batches=4"),
    Case("pp=4,micro_batches=2"),
    Case("tp=2,pp=2,micro_batches=2"),
    Case("tp=2,pp=2,sp=true,schedule=interleaved,virtual=2,micro_batches=4,recompute=full", "glm4"),
    Case("tp=2,dp=2,zero=2,micro_batches=2", "glm4"),
    Case("tp=2,dp=2,zero=3,sp=true,micro_batches=2"),
    Case("pp=2,dp=2,micro_batches=2", "10b"),
    Case("pp=2,dp=2,zero=3,micro_batches=2", "glm4"),
    Case("pp=2,dp=2,zero=2,schedule=zero-bubble,virtual=2,micro_batches=4"),
    Case("dp=2,ep=2,micro_batches=2,recompute=full", "moe"),
    Case("tp=2,sp=true", "moe"),
    Case("dp=4,ep=2,zero=3,micro_batches=2", "moe"),
    Case("tp=2,dp=2,ep=2,zero=2", "moe"),
    Case("pp=2,dp=2,ep=2,micro_batches=2", "moe"),
    Case("tp=2,dp=2,ep=2", "mtp"),
]

PLANTED = [
    Case("dp=2", bug="mean_over_ranks"),
    Case("dp=2", bug="mean_per_rank"),
    Case("dp=2", bug="same_rows"),
    Case("dp=2,zero=1", bug="zero_averages"),
    Case("tp=2", bug="bias_per_rank"),
    Case("tp=2", bug="halves_cut_together"),
    Case("tp=2", bug="own_logsumexp"),
    Case("tp=2,sp=true", bug="norms_not_summed"),
    Case("pp=2,micro_batches=2", bug="alpha_of_the_stage"),
    Case("pp=2,micro_batches=2", bug="ends_apart"),
    Case("pp=2,micro_batches=2", bug="norm_of_a_part"),
    Case("dp=2,ep=2", "moe", bug="experts_over_all_ranks"),
    Case("dp=2,ep=2", "moe", bug="rows_to_the_wrong_rank"),
]
