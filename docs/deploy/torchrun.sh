#!/bin/sh
# Run it on every host with its own NODE_RANK: NODE_RANK=1 MASTER_ADDR=node-0 sh torchrun.sh
set -eu
exec torchrun \
  --nnodes=2 --nproc-per-node=8 --node-rank="${NODE_RANK:?0 on the first host, 1 on the second}" \
  --master-addr="${MASTER_ADDR:?the first host, as the others reach it}" --master-port="${MASTER_PORT:-29500}" \
  -m glm_core.cli train --config run.toml --backend "${BACKEND:-cuda}" \
  --plan tp=8,dp=2,zero=1,micro_batches=4 --out "${OUT:-/shared/glm/run}" --resume --timeout 600
