#!/usr/bin/env bash
# Runs the test suite in the environment of run_train.sh. Arguments go to pytest: ./run_tests.sh -m "not slow" -k conv
set -e
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
exec python -m pytest "$@"
