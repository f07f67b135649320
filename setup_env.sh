# Sourced by run_train.sh and run_tests.sh: makes .venv beside this file ready and puts it first on PATH.
# A finished install leaves a stamp with the checksum of what it was made from; anything else installs again.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAMP="$ROOT/.venv/installed-from"
WANTED=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)
if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
    PYTHON=${PYTHON:-python3}
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "PYTHON is '$PYTHON'; it must be a Python of version 3.11 or newer." >&2
        exit 2
    fi
    echo "Preparing $ROOT/.venv (once; a few minutes, depending on the network)"
    "$PYTHON" -m venv "$ROOT/.venv"
    # torch first and by its exact version: asked for through a range, pip may fetch a newer build with gigabytes of CUDA.
    "$ROOT/.venv/bin/pip" install --quiet --disable-pip-version-check "$(grep '^torch==' "$ROOT/constraints.txt")"
    "$ROOT/.venv/bin/pip" install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT[test]"
    echo "$WANTED" > "$STAMP"
fi
export PATH="$ROOT/.venv/bin:$PATH"
