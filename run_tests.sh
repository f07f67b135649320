#!/usr/bin/env bash
# Runs the test suite in the environment of run_train.sh. Arguments go to pytest: ./run_tests.sh -m "not slow" -k conv
# JOBS: files at a time, by default one a core; JOBS=0 for --pdb and the like.
set -e
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
exec python -m pytest -n "${JOBS:-auto}" --dist loadfile "$@"
