#!/usr/bin/env bash
# A real SLURM of two nodes on one machine, without systemd; for tests.
#
#   tests/slurm/start_slurm.sh FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/stop_slurm.sh FOLDER
#
# Everything lies in FOLDER, which is made (a short path: sockets allow some 100 characters):
# a munge of its own with its own key, the controller, two slurmd. An installed SLURM is left
# alone; ports are those given below. Needs slurm-wlm and munge, and root.
set -euo pipefail
FOLDER=$(realpath -m "$1")
CONTROL_PORT=${CONTROL_PORT:-16817}
NODE_PORT=${NODE_PORT:-17001} # of the first node; the second has the next one

export PATH=$PATH:/usr/sbin:/sbin
HOST=$(hostname)
USER_NAME=$(id -un)
mkdir -p "$FOLDER"
chmod 755 "$FOLDER" # munge wants its socket to be reachable, and its folder not to be writable
mkdir "$FOLDER"/{state,log,spool-n1,spool-n2}

cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$CONTROL_PORT
SlurmUser=$USER_NAME
SlurmdUser=$USER_NAME
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again only when its old credentials are void: not after two minutes.
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=5
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd-%n.log
# No control groups: they belong to the machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=2
# Two "machines" with one name, that claim more than there may be.
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$NODE_PORT CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((NODE_PORT + 1)) CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$FOLDER/slurm.conf

# Waits until a command succeeds; a minute is a safety net.
await() {
    for _ in $(seq 300); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "gave up waiting for: $*" >&2
    tail -n 20 "$FOLDER"/log/* >&2
    return 1
}
both_idle() {
    [[ $(sinfo --noheader --Node --states=idle --format=%N | sort -u | wc -l) == 2 ]]
}

head -c 1024 /dev/urandom >"$FOLDER/munge.key"
chmod 600 "$FOLDER/munge.key"
munged --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" \
    --pid-file="$FOLDER/munged.pid" --log-file="$FOLDER/log/munged.log" \
    --seed-file="$FOLDER/munged.seed"
await munge --socket="$FOLDER/munge.socket" --no-input
slurmctld
await scontrol ping
for node in n1 n2; do
    slurmd -N "$node"
done
await both_idle
