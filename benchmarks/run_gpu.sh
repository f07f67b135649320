#!/usr/bin/env bash
# On a machine with a GPU: runs the tests that need one and the benchmarks, and leaves all they say in a folder.
#   benchmarks/run_gpu.sh FOLDER [arguments of op_gpu.py]        (or OUT=FOLDER benchmarks/run_gpu.sh)
# Takes the Python that is first in PATH, which needs torch, triton, pytest, hypothesis and numpy; torchao for float8, and
# flash-linear-attention to be compared with.
set -u
out=${1:-${OUT:?give a folder for the results}}
shift || true
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
logged() {  # NAME COMMAND...: what a command says goes to NAME.log; a failure does not keep the next from running
    local name=$1
    shift
    "$@" 2>&1 | tee "$out/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
}
logged tests python -m pytest -m gpu --durations=10 --junitxml="$out/tests.xml"
logged op_gpu python benchmarks/op_gpu.py --out "$out" "$@"
logged train_gpu python benchmarks/train_gpu.py --out "$out"
exit $status
