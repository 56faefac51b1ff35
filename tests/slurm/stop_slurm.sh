#!/usr/bin/env bash
# Ends what start_slurm.sh has started in FOLDER, and nothing else.
#
#   tests/slurm/stop_slurm.sh FOLDER
set -uo pipefail
FOLDER=$(realpath -m "$1")
export SLURM_CONF=$FOLDER/slurm.conf

# Jobs first: their processes are children of what the nodes have started.
for job in $(timeout 20 squeue --noheader --format=%A 2>/dev/null); do
    timeout 20 scancel --full --signal=KILL "$job"
    timeout 20 scancel "$job"
done
for _ in $(seq 100); do
    [[ -z $(timeout 20 squeue --noheader 2>/dev/null) ]] && break
    sleep 0.2
done

left=0
for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
    [[ -f $FOLDER/$daemon.pid ]] || continue
    pid=$(<"$FOLDER/$daemon.pid")
    # The number may be somebody else's by now.
    grep -qs "${daemon%-*}" "/proc/$pid/comm" || continue
    kill "$pid"
    for _ in $(seq 100); do
        [[ -e /proc/$pid ]] || continue 2
        sleep 0.1
    done
    echo "$daemon did not end; killed" >&2
    kill -KILL "$pid"
    left=1
done
exit "$left"
