#!/usr/bin/env bash
# On a machine with a GPU: tests and benchmarks in stages, each of which leaves its results in a folder.
#   benchmarks/run_gpu.sh FOLDER [a b c d]        (or OUT=FOLDER benchmarks/run_gpu.sh [a b c d])
#   a   90 s  every kernel against fp64: forward, backward, decoding                    check_gpu.{log,json,md}
#   b  240 s  forward + backward beside flash-linear-attention and softmax attention,
#             decoding beside a copy, and what was predicted                            op_gpu.{log,json,md}
#   c  300 s  the tests that need a GPU                                                 tests.{log,xml}
#   d  180 s  training steps of the 400M and 1.3B models                                train_gpu.{log,json,md}
# Without letters: all of them, at most 13.5 minutes. A stage that fails or runs out of time does not keep the next from
# running; the exit status is 1 if any did, and stages.txt has a line for each.
# Takes the Python that is first in PATH, which needs torch and triton; for c pytest, hypothesis and numpy. TorchTitan is
# not needed. Kernels run in their default configurations unless GDN2_TITAN_AUTOTUNE=1. Machine code is kept in
# TRITON_CACHE_DIR, by default FOLDER/triton: benchmarks/precompile.py fills such a folder beforehand.
set -u
if [ $# -gt 0 ] && [[ ! $1 =~ ^[abcd]$ ]]; then
    out=$1
    shift
else
    out=${OUT:?give a folder for the results}
fi
for stage in "$@"; do
    [[ $stage =~ ^[abcd]$ ]] || { echo "the stage is '$stage'; it must be one of a, b, c, d" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- a b c d
mkdir -p "$out"
out=$(cd "$out" && pwd)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/triton} GDN2_TITAN_AUTOTUNE=${GDN2_TITAN_AUTOTUNE:-0}
mkdir -p "$TRITON_CACHE_DIR"
TRITON_CACHE_DIR=$(cd "$TRITON_CACHE_DIR" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
logged() {  # STAGE SECONDS NAME COMMAND...: what a command says goes to NAME.log, how it ended to stages.txt
    local stage=$1 seconds=$2 name=$3 begun=$SECONDS code before after
    shift 3
    before=$(find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l)
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    after=$(find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l)
    [ "$code" -eq 0 ] || status=1
    echo "$stage $name: exit status $code after $((SECONDS - begun)) s of $seconds, $((after - before)) kernels compiled" |
        tee -a "$out/stages.txt"
}
if [ -e "$TRITON_CACHE_DIR/compiled_by.json" ]; then
    python benchmarks/precompile.py --compare "$TRITON_CACHE_DIR" 2>&1 | tee "$out/precompiled.log"
fi
for stage in "$@"; do
    case $stage in
        a) logged a 90 check_gpu python benchmarks/check_gpu.py --out "$out" ;;
        b) logged b 240 op_gpu python benchmarks/op_gpu.py --out "$out" --lengths \
            --implementations gdn2_titan flash-linear-attention "softmax attention" ;;
        c) logged c 300 tests python -m pytest -m gpu -p no:cacheprovider --durations=10 --junitxml="$out/tests.xml" \
            tests/test_gpu.py tests/test_triton_*.py ;;
        d) logged d 180 train_gpu python benchmarks/train_gpu.py --out "$out" --flavor 400M 1.3B --shape 4096x4 \
            --how eager compiled --warmup 3 --steps 5 ;;
    esac
done
exit $status
