# Sourced by run_train.sh and run_tests.sh: `prepare 0.2` or `prepare 0.3`, TorchTitan's generation, makes an environment
# beside this file ready and puts it first on PATH.
# A finished install leaves a stamp with the checksum of what it was made from; anything else installs again.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

prepare() {
    local venv constraints wanted
    case "$1" in
        0.2) venv="$ROOT/.venv" constraints="$ROOT/constraints.txt" ;;
        0.3) venv="$ROOT/.venv-titan03" constraints="$ROOT/constraints-titan03.txt" ;;
        *) echo "TITAN is '$1'; it must be 0.2 or 0.3." >&2; exit 2 ;;
    esac
    wanted=$(cat "$ROOT/pyproject.toml" "$constraints" | cksum)
    if [ "$(cat "$venv/installed-from" 2>/dev/null)" != "$wanted" ]; then
        PYTHON=${PYTHON:-python3}
        if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "PYTHON is '$PYTHON'; it must be a Python of version 3.11 or newer." >&2
            exit 2
        fi
        echo "Preparing $venv (once; a few minutes, depending on the network)"
        "$PYTHON" -m venv "$venv"
        # torch first and by its exact version: asked for through a range, pip may fetch a newer build with gigabytes of
        # CUDA.
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$(grep '^torch==' "$constraints")"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$constraints" -e "$ROOT[test]"
        echo "$wanted" > "$venv/installed-from"
    fi
    export PATH="$venv/bin:$PATH"
}
