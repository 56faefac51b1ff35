#!/usr/bin/env bash
# Run the digits example under torchrun, on one or several machines.
#
#   examples/clusters/torchrun.sh                           # two processes on this machine
#   NPROC=8 examples/clusters/torchrun.sh                   # eight
#   NNODES=2 NODE_RANK=0 MASTER=node0:29500 RUN=/shared/a examples/clusters/torchrun.sh
#   NNODES=2 NODE_RANK=1 MASTER=node0:29500 RUN=/shared/a examples/clusters/torchrun.sh
#
# Set any variable below in the environment. Arguments of the script are passed to
# `lightning-woodfisher fit`.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

NPROC=${NPROC:-2}                # processes on each machine: one for each GPU
NNODES=${NNODES:-1}              # machines
NODE_RANK=${NODE_RANK:-0}        # index of this machine: 0, 1, ...
MASTER=${MASTER:-localhost:29500} # address of machine 0, and a free port
INTERFACE=${INTERFACE:-}         # network interface between the machines, e.g. eth0, ib0
ACCELERATOR=${ACCELERATOR:-auto} # CPUs are fast enough for the digits
CONFIG=${CONFIG:-$REPO/examples/digits/woodfisher.yaml}
RUN=${RUN:-$REPO/runs/clusters/torchrun} # the same path on all machines
PYTHON=${PYTHON:-python}

# By default, each process would use all cores and slow down the others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# For importing examples.digits.model.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
if [[ -n $INTERFACE ]]; then
    # Otherwise a machine with several networks may announce an unreachable address.
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

launch=(--nnodes "$NNODES" --nproc-per-node "$NPROC")
if ((NNODES == 1)); then
    # torchrun chooses a free port, so that several runs can share a machine.
    launch+=(--standalone)
else
    # Static rendezvous: ranks follow from NODE_RANK, and only this port must be open.
    launch+=(--node-rank "$NODE_RANK"
        --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}")
fi

# Relative paths of the configuration (checkpoints, logs, reports) refer to the run's folder.
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
