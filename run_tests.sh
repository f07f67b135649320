#!/usr/bin/env bash
# Runs the test suite with TorchTitan 0.2.2, then what concerns TorchTitan with 0.3.0; TITAN=0.2 or TITAN=0.3 runs one of
# the two, TITAN=vllm the tests of vLLM's engine and of the transformers model under the older transformers that vLLM
# wants. Without arguments: every promise once, in minutes. --all: every test, those of TITAN=vllm too. Other arguments go
# to pytest, which then runs what they choose, slow or not: ./run_tests.sh tests/test_models.py -k conv
# JOBS: tests at a time, by default one a core; JOBS=0 for --pdb and the like.
set -e
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

NO_TESTS=5
default=(-m "not slow")
vllm=(tests/test_serve_engine.py tests/test_serve_http.py tests/test_hf_model.py)
environments=${TITAN:-0.2 0.3}
if [ "$1" = --all ]; then
    shift
    default=()
    # The tables that tests write are of environments with TorchTitan.
    for argument in "$@"; do
        case "$argument" in --composability=* | --versions=*) ;; *) vllm+=("$argument") ;; esac
    done
    if [ -z "$TITAN" ]; then environments+=" vllm"; fi
elif [ $# != 0 ]; then
    default=()
    # Without a file of their own they choose among those of vLLM's engine.
    case " $*" in *" tests/"*) vllm=("$@") ;; *) vllm+=("$@") ;; esac
fi

status=0
for environment in $environments; do
    prepare "$environment"
    # A worker that is done takes tests from the other: what tests of a file share is made once or twice.
    arguments=(-n "${JOBS:-auto}" --dist worksteal "${default[@]}" "$@")
    if [ "$environment" = 0.3 ]; then arguments=(--only-titan "${arguments[@]}"); fi
    # One at a time: an engine takes all cores.
    if [ "$environment" = vllm ]; then arguments=("${vllm[@]}"); fi
    code=0
    python -m pytest "${arguments[@]}" || code=$?
    # What the arguments select need not concern TorchTitan, or vLLM.
    if [ "$code" = "$NO_TESTS" ] && [ "$environment" != 0.2 ] && [ $# -gt 0 ]; then code=0; fi
    if [ "$code" != 0 ]; then status=$code; fi
done
exit "$status"
