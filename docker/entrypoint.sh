#!/bin/sh
# entrypoint.sh VERB ...: `sdit VERB ...` in a container, once for each rank of this node where the verb runs on ranks.
#
# RANKS_PER_NODE (default 1) says how many ranks this node has. In a pod of an Indexed Job every rank finds its number from
# JOB_COMPLETION_INDEX, NNODES and its LOCAL_RANK; without one this node is the whole job.
set -eu

ranks=${RANKS_PER_NODE:-1}
case $ranks in
'' | 0* | *[!0-9]*)
    echo "error: RANKS_PER_NODE: '$ranks' is not legal; legal: a whole number from 1" >&2
    exit 78
    ;;
esac
case ${1:---help} in
train | doctor) ;;
*) ranks=1 ;; # these run on one rank, whatever the node has
esac
if [ "$ranks" -eq 1 ]; then
    exec sdit "$@"
fi

if [ -z "${JOB_COMPLETION_INDEX:-}" ]; then
    export WORLD_SIZE="$ranks" LOCAL_WORLD_SIZE="$ranks"
fi

# tini -g signals the ranks as well as this shell. The shell only has to outlive them, so that their exit code is the container's.
trap : TERM INT USR1 USR2 HUP

processes=
local_rank=0
while [ "$local_rank" -lt "$ranks" ]; do
    (
        trap - TERM INT USR1 USR2 HUP
        [ -z "${WORLD_SIZE:-}" ] || export RANK="$local_rank"
        LOCAL_RANK=$local_rank exec sdit "$@"
    ) &
    processes="$processes $!"
    local_rank=$((local_rank + 1))
done

# A signal cuts `wait` short; the process is then still there.
exit_code() {
    while :; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

# The ranks agree on their exit code; a rank that was killed has its own, and then the others' says more.
code=0
for process in $processes; do
    status=0
    exit_code "$process" || status=$?
    if [ "$status" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -ge 128 ]; }; then
        code=$status
    fi
done
exit "$code"
