#!/usr/bin/env bash
# The digits example under torchrun, on one machine or on several.
#
#   examples/clusters/torchrun.sh                           # two processes on this machine
#   NPROC=8 examples/clusters/torchrun.sh                   # eight
#   NNODES=2 NODE_RANK=0 MASTER=node0:29500 RUN=/shared/a examples/clusters/torchrun.sh
#   NNODES=2 NODE_RANK=1 MASTER=node0:29500 RUN=/shared/a examples/clusters/torchrun.sh
#
# Every variable below can be given in the environment. What follows the script's name is
# passed on to `lightning-woodfisher fit`.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

NPROC=${NPROC:-2}                # processes on each machine: one for each GPU
NNODES=${NNODES:-1}              # machines
NODE_RANK=${NODE_RANK:-0}        # which of them this is: 0, 1, ...
MASTER=${MASTER:-localhost:29500} # machine 0 as the others reach it, and a free port
INTERFACE=${INTERFACE:-}         # network interface between the machines, e.g. eth0, ib0
ACCELERATOR=${ACCELERATOR:-auto} # the digits are small enough for CPUs
CONFIG=${CONFIG:-$REPO/examples/digits/woodfisher.yaml}
RUN=${RUN:-$REPO/runs/clusters/torchrun} # the same path on all machines
PYTHON=${PYTHON:-python}

# Without it each process takes all cores, and they get into each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# examples.digits.model is imported from the clone.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
if [[ -n $INTERFACE ]]; then
    # A machine with several networks may otherwise offer an address that others cannot reach.
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

launch=(--nnodes "$NNODES" --nproc-per-node "$NPROC")
if ((NNODES == 1)); then
    # A free port is chosen: two runs on one machine do not meet.
    launch+=(--standalone)
else
    # Static: ranks follow from NODE_RANK, and nothing but this one port needs to be open
    # for the machines to find each other.
    launch+=(--node-rank "$NODE_RANK"
        --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}")
fi

# Relative paths of the configuration (checkpoints, logs, reports) end in the run's folder.
mkdir -p "$RUN"
cd "$RUN"
exec "$PYTHON" -m torch.distributed.run "${launch[@]}" -m lightning_woodfisher fit \
    --config "$CONFIG" \
    --trainer.accelerator "$ACCELERATOR" \
    --trainer.strategy ddp \
    --trainer.devices "$NPROC" \
    --trainer.num_nodes "$NNODES" \
    --trainer.default_root_dir "$RUN" \
    "$@"
