#!/usr/bin/env bash
# One of several machines (not yet run on several): NODES=8 NODE=0 HEAD=first-machine examples/cluster/torchrun.sh -c recipes/lm/lavit-7b.yaml ...
# Lightning takes ranks and addresses from torchrun; --ckpt_path=last continues after a failure.
set -euo pipefail
exec torchrun --nnodes="${NODES:-1}" --node-rank="${NODE:-0}" --nproc-per-node="${GPUS:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:29500" --rdzv-id=lavit \
    -m lavit_lm.cli fit --trainer.num_nodes="${NODES:-1}" --trainer.devices="${GPUS:-8}" --ckpt_path=last "$@"
