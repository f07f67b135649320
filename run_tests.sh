#!/usr/bin/env bash
# Runs the test suite with TorchTitan 0.2.2, then what concerns TorchTitan with 0.3.0; TITAN=0.2 or TITAN=0.3 runs one of
# the two. Arguments go to pytest: ./run_tests.sh -m "not slow" -k conv
# JOBS: files at a time, by default one a core; JOBS=0 for --pdb and the like.
set -e
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

NO_TESTS=5
status=0
for titan in ${TITAN:-0.2 0.3}; do
    prepare "$titan"
    only=()
    if [ "$titan" = 0.3 ]; then only=(--only-titan); fi
    code=0
    python -m pytest -n "${JOBS:-auto}" --dist loadfile "${only[@]}" "$@" || code=$?
    # What the arguments select need not concern TorchTitan.
    if [ "$code" = "$NO_TESTS" ] && [ "$titan" = 0.3 ] && [ $# -gt 0 ]; then code=0; fi
    if [ "$code" != 0 ]; then status=$code; fi
done
exit "$status"
