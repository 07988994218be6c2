#!/usr/bin/env bash
# Runs a training command again for as long as it ends before the run is complete and not because somebody wants it to.
#
#     jobs/restart.sh [--times N] [--] mpirun ... python -m hpcavg ... --resume auto --output DIR
#
# N: restarts without a new checkpoint in between, 3 unless given. jobs/README.md says when it restarts, and its status.
# May be sourced, too: `restart ARGUMENTS`, and `forward SIGNAL` from traps of your own.
set -euo pipefail

# So close to the end of a Slurm job, the scheduler starts it again with more time.
restart_margin_s=300
restart_child=
restart_asked=
restart_woken=

restart_say() {
    echo "restart.sh: $*" >&2
}

# restart_option NAME COMMAND...: print what the command gives for --NAME, nothing where it does not.
restart_option() {
    local name=$1 value=
    shift
    while (($#)); do
        case $1 in
            "--$name") value=${2-} ;;
            "--$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# restart_out_of_time BEGAN COMMAND...: succeed where the time limit is the reason to stop.
restart_out_of_time() {
    local began=$1 limit_s
    shift
    limit_s=$(restart_option stop-after "$@")
    if [[ -n $limit_s ]] && ((SECONDS - began >= $(LC_ALL=C printf '%.0f' "$limit_s"))); then
        return 0
    fi
    [[ -n ${SLURM_JOB_END_TIME-} ]] && (($(date +%s) + restart_margin_s >= SLURM_JOB_END_TIME))
}

# Whether the summary is a new file: mpirun ends with status 0 also when it has lost a node, or ULFM all its ranks.
restart_stamp() {
    stat -c '%i %y' "$1/summary.json" 2> /dev/null || true
}

# forward SIGNAL: ask the run for a checkpoint and to stop. mpirun would kill its ranks 0.25 s after a TERM.
forward() {
    restart_asked=$1 restart_woken=yes
    if [[ -n $restart_child ]]; then
        kill -USR1 "$restart_child" 2> /dev/null || true
    fi
}

# restart_once COMMAND...: run it to its end; return its status.
restart_once() {
    local status
    "$@" &
    restart_child=$!
    if [[ -n $restart_asked ]]; then
        forward "$restart_asked"
    fi
    while true; do
        restart_woken='' status=0
        wait "$restart_child" || status=$?
        [[ -n $restart_woken ]] || break # wait also ends when a signal comes
    done
    restart_child=
    return "$status"
}

# restart [--times N] [--] COMMAND...: see above.
restart() {
    local times=3 output status began before saved tries=0 count=0
    if [[ ${1-} == --times ]]; then
        times=${2-}
        shift $(($# < 2 ? $# : 2))
        if [[ ! $times =~ ^[0-9]+$ ]]; then
            restart_say "error: --times $times: must be a number of restarts"
            return 2
        fi
    fi
    if [[ ${1-} == -- ]]; then
        shift
    fi
    output=$(restart_option output "$@")
    if [[ -z $output || $(restart_option resume "$@") != auto ]]; then
        restart_say "error: the command must have --resume auto and --output DIR, to find what it has done so far"
        return 2
    fi
    while true; do
        began=$SECONDS before=$(restart_stamp "$output")
        saved=$(readlink "$output/checkpoints/latest" || true)
        status=0
        restart_once "$@" || status=$?
        if ((status == 0)) && [[ $(restart_stamp "$output") != "$before" ]]; then
            restart_say "done, after $count restarts"
            return 0
        fi
        if ((status == 2 || status == 3)); then # bad input; done, but for its records
            restart_say "ended with status $status, after $count restarts"
            return "$status"
        fi
        if [[ -n $restart_asked && -e $output/checkpoints/latest ]]; then
            restart_say "stopped by SIG$restart_asked (status $status), after $count restarts; to be started again"
            return 75
        fi
        if [[ -n $restart_asked ]] || ((status == 1 || status == 130 || status == 143)); then
            restart_say "ended with status $status, after $count restarts"
            return $((status == 0 ? 1 : status))
        fi
        if ((status == 75)) && restart_out_of_time "$began" "$@"; then
            restart_say "stopped by the time limit, after $count restarts; to be started again"
            return 75
        fi
        if [[ $(readlink "$output/checkpoints/latest" || true) != "$saved" ]]; then
            tries=0
        fi
        if ((tries == times)); then
            restart_say "given up after $count restarts, $times of them without a new checkpoint; last status $status"
            return $((status == 0 ? 1 : status))
        fi
        tries=$((tries + 1)) count=$((count + 1))
        restart_say "status $status, not complete: restart $count"
    done
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    trap 'forward TERM' TERM
    trap 'forward USR1' USR1
    restart "$@"
fi
