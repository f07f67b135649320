#!/usr/bin/env bash
# Runs the test suite with TorchTitan 0.2.2, then what concerns TorchTitan with 0.3.0; TITAN=0.2 or TITAN=0.3 runs one of
# the two. Without arguments: every promise once, in minutes. --all: every test. Other arguments go to pytest, which
# then runs what they choose, slow or not: ./run_tests.sh tests/test_models.py -k conv
# JOBS: tests at a time, by default one a core; JOBS=0 for --pdb and the like.
set -e
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

NO_TESTS=5
if [ $# = 0 ]; then set -- -m "not slow"; fi
if [ "$1" = --all ]; then shift; fi

status=0
for titan in ${TITAN:-0.2 0.3}; do
    prepare "$titan"
    only=()
    if [ "$titan" = 0.3 ]; then only=(--only-titan); fi
    code=0
    # A worker that is done takes tests from the other: what tests of a file share is made once or twice.
    python -m pytest -n "${JOBS:-auto}" --dist worksteal "${only[@]}" "$@" || code=$?
    # What the arguments select need not concern TorchTitan.
    if [ "$code" = "$NO_TESTS" ] && [ "$titan" = 0.3 ] && [ $# -gt 0 ]; then code=0; fi
    if [ "$code" != 0 ]; then status=$code; fi
done
exit "$status"
