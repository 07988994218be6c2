# shellcheck shell=bash
# What every job does first: the one place to edit for a site. The scripts beside it source it.
#
# What is set by ${NAME-value}, here and in the scripts, can be set outside, too: HPCAVG_LAUNCHER=srun sbatch ...

trap 'echo "job: error: environment.sh has failed before the job began" >&2' EXIT

# -- the site -----------------------------------------------------------------------------------------------------

set +u # modules may not be written for it
# module purge
# module load openmpi                       # the one that mpi4py was built with: docs/clusters.md
HPCAVG_VENV=${HPCAVG_VENV-.venv}            # the virtual environment with hpcavg; empty: python is on the PATH
HPCAVG_CONTAINER=${HPCAVG_CONTAINER-}       # an Apptainer image with hpcavg in its place
HPCAVG_RUNS=${HPCAVG_RUNS-runs}             # where runs are written: a file system that all nodes see, with room
HPCAVG_LAUNCHER_FLAGS=${HPCAVG_LAUNCHER_FLAGS-} # options of mpirun, srun or jsrun, such as --with-ft ulfm
# Every rank writes files of its own, and parallel file systems may refuse HDF5's locks.
export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING-FALSE}
# Scratch space of the node, where the site has some.
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
set -u

say() {
    echo "job: $*" >&2
}

fail() {
    say "error: $*"
    exit 2
}

# -- the allocation -----------------------------------------------------------------------------------------------

# shellcheck disable=SC2034 # the scripts take job and array_task
if [[ -n ${SLURM_JOB_ID-} ]]; then
    job_id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
    job=$SLURM_JOB_NAME-$job_id
    array_task=${SLURM_ARRAY_TASK_ID-}
    # One task of an array must be named so: the last one's own id means the whole array, too.
    job_id+=${array_task:+_$array_task}
    num_ranks=$SLURM_NTASKS
    ranks_per_node=${SLURM_TASKS_PER_NODE%%[(,]*}
    cpus_per_rank=${SLURM_CPUS_PER_TASK:-1}
    # hpcavg stops in time by this; older versions of Slurm do not set it.
    if [[ -z ${SLURM_JOB_END_TIME-} ]]; then
        end=$(squeue -h -j "$job_id" -o %e || true) # no date where there is no limit
        if [[ $end == ????-??-* ]]; then
            SLURM_JOB_END_TIME=$(date -d "$end" +%s)
            export SLURM_JOB_END_TIME
        fi
    fi
elif [[ -n ${LSB_JOBID-} ]]; then
    job=${LSB_JOBNAME%%\[*}-$LSB_JOBID
    array_task=${LSB_JOBINDEX-}
    # LSF does not tell these to a job; its script does.
    num_ranks=${HPCAVG_RANKS:?}
    ranks_per_node=${HPCAVG_RANKS_PER_NODE:?}
    cpus_per_rank=${HPCAVG_CPUS_PER_RANK:?}
else
    fail "neither Slurm nor LSF has started this; submit it with sbatch, or bsub <"
fi
export OMP_NUM_THREADS=$cpus_per_rank

# -- how a program is started on all its ranks ----------------------------------------------------------------------

case $HPCAVG_LAUNCHER in
    mpirun)
        launcher=(mpirun -np "$num_ranks" --map-by "ppr:$ranks_per_node:node:PE=$cpus_per_rank" --bind-to core)
        ;;
    srun)
        launcher=(srun --mpi=pmix --ntasks "$num_ranks" --cpus-per-task "$cpus_per_rank" --kill-on-bad-exit=1)
        ;;
    jsrun)
        launcher=(jsrun --nrs "$num_ranks" --tasks_per_rs 1 --rs_per_host "$ranks_per_node")
        launcher+=(--cpu_per_rs "$cpus_per_rank" --gpu_per_rs "${HPCAVG_GPUS_PER_RANK:-0}" --bind rs)
        ;;
    *)
        fail "HPCAVG_LAUNCHER=$HPCAVG_LAUNCHER: must be mpirun, srun or jsrun"
        ;;
esac
read -ra more <<< "$HPCAVG_LAUNCHER_FLAGS"
launcher+=("${more[@]}")

if [[ -n $HPCAVG_CONTAINER ]]; then
    [[ -e $HPCAVG_CONTAINER ]] || fail "HPCAVG_CONTAINER=$HPCAVG_CONTAINER: no such image"
    python=(apptainer exec --nv --bind "$PWD" "$HPCAVG_CONTAINER" python)
else
    python=(python)
    if [[ -n $HPCAVG_VENV ]]; then
        [[ -e $HPCAVG_VENV/bin/activate ]] || fail "HPCAVG_VENV=$HPCAVG_VENV: no virtual environment (make install)"
        # shellcheck disable=SC1091
        set +u && source "$HPCAVG_VENV/bin/activate" && set -u
    fi
fi

command -v "${launcher[0]}" > /dev/null || fail "no ${launcher[0]} here: load its module in environment.sh"

output=$HPCAVG_RUNS began=$SECONDS requeued=
# shellcheck source=restart.sh
source "${BASH_SOURCE[0]%/*}/restart.sh"
# Slurm may send its warning a minute early.
restart_margin_s=$((${HPCAVG_WARNING_S:-180} + 120))
trap 'stop TERM' TERM
trap 'stop USR1' USR1

# stop SIGNAL: ask the run for a checkpoint, and say so at once: there may be no time to say anything later.
stop() {
    say "SIG$1: it is to stop$(is_out_of_time "$1" && echo ': out of time, the limit is near')"
    forward "$1"
}

# is_out_of_time SIGNAL: by the clock, where the end is known; LSF does not tell it, but sends SIGUSR1 before it.
is_out_of_time() {
    if [[ -n ${SLURM_JOB_END_TIME-} ]]; then
        restart_out_of_time "$began"
    else
        [[ $1 == USR1 ]]
    fi
}

# train OPTIONS...: run hpcavg on all ranks, again where that helps (restart.sh); the status is that of the last time.
# Once with --resume unset, for algorithms whose servers' state is in no checkpoint.
train() {
    local run=(restart --)
    output=$(restart_option output "$@")
    began_with=$(newest_checkpoint)
    if [[ $(restart_option resume "$@") == unset ]]; then
        run=(restart_once)
    fi
    "${run[@]}" "${launcher[@]}" "${python[@]}" -m hpcavg "$@"
}

newest_checkpoint() {
    readlink "$output/checkpoints/latest" || true
}

# requeue: have this job started again, after the same command, unless it has got no further than it was, or somebody has
# stopped it.
requeue() {
    if [[ -n $restart_asked ]] && ! is_out_of_time "$restart_asked"; then
        say "SIG$restart_asked came long before the limit, so it is not queued again"
        return
    fi
    if [[ $(newest_checkpoint) == "$began_with" ]]; then
        say "error: no new checkpoint since the job began, so it is not queued again; it needs a longer limit"
        exit 1 # and no status that asks for another time
    fi
    requeued=yes
    if [[ -n ${SLURM_JOB_ID-} ]]; then
        trap '' TERM # which every process of the job gets now
        scontrol requeue "$job_id"
    fi # LSF does it by itself for a job that ends with a status of #BSUB -Q
}

# -- the log's last lines say how the job ended -----------------------------------------------------------------------

tell_end() {
    local status=$? free_kib nodes
    trap - EXIT
    set +e # what cannot be found out must not change the status
    case $status in
        0) say "done" ;;
        2) say "ended with status 2: the input cannot be used" ;;
        3) say "ended with status 3: done, but records were lost" ;;
        75)
            say "stopped${restart_asked:+ by SIG$restart_asked}, with a checkpoint"
            if [[ -n $requeued ]]; then
                say "it is queued again, and goes on from there"
            else
                say "the same options and --output $output --resume auto go on from there"
            fi
            ;;
        *) say "ended with status $status" ;;
    esac
    if ((status)); then
        if is_out_of_time "$restart_asked"; then
            say "out of time: the job's limit was near"
        fi
        free_kib=$(df -P "$output" "$HPCAVG_RUNS" 2> /dev/null | awk 'NR == 2 { print $4 }')
        if ((${free_kib:-1048576} < 102400)); then
            say "the disk of $output is full: $((free_kib / 1024)) MiB are free"
        fi
        if [[ -n ${SLURM_JOB_NODELIST-} ]]; then
            nodes=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t down,drain,fail,no_respond -o %N 2> /dev/null | sort -u | xargs)
            if [[ -n $nodes ]]; then
                say "nodes that are down or do not respond: $nodes"
            fi
        fi
    fi
    exit "$status"
}
trap tell_end EXIT
