#!/usr/bin/env bash
# Makes .venv with the pinned dependencies when it is missing or out of date; prints what it does.
# CUDA packages where there is an NVIDIA GPU, else CPU builds. PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=cuda; else kind=cpu; fi
want=$(cat "requirements/$kind".* pyproject.toml | sha256sum | cut -c1-16)
stamp=.venv/.installed-$kind-$want
if [ -e "$stamp" ]; then
    echo "set-up: .venv is ready ($kind)"
    exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    for name in python3.11 python3 python3.12; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python=$name
            break
        fi
    done
fi
[ -n "$python" ] || { echo "set-up: no Python 3.11 or newer found; install one, or set PYTHON" >&2; exit 1; }

echo "set-up: $kind packages into .venv with $("$python" --version) (some minutes, once)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
if [ "$kind" = cpu ]; then
    [ -z "${TORCH_CPU_INDEX:-}" ] || pip+=(--extra-index-url "$TORCH_CPU_INDEX")
    if ! "${pip[@]}" --no-deps -r requirements/cpu.lock; then
        echo "set-up: the install failed. If torch's CPU build (+cpu) was not found, set TORCH_CPU_INDEX to" >&2
        echo "        PyTorch's CPU wheel index (the install page of PyTorch names it) and run this again." >&2
        exit 1
    fi
    "${pip[@]}" --no-deps --no-build-isolation -e .
    rm -rf .venv/transformer_engine
    "${pip[@]}" --no-deps --target .venv/transformer_engine -r requirements/cpu.transformer_engine.txt
else
    grep -v '^transformer-engine-torch==' requirements/cuda.lock >.venv/cuda.lock
    "${pip[@]}" --no-deps -r .venv/cuda.lock
    # Transformer Engine's extension is compiled here (10 CPU minutes), against the CUDA that comes with torch.
    nvidia=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
    export CUDA_HOME="$nvidia/cu13" CPATH="$nvidia/cudnn/include:$nvidia/nccl/include${CPATH:+:$CPATH}"
    export PATH="$PWD/.venv/bin:$PATH" # ninja
    "${pip[@]}" --no-deps --no-build-isolation "$(grep '^transformer-engine-torch==' requirements/cuda.lock)"
    "${pip[@]}" --no-deps --no-build-isolation -e .
fi
touch "$stamp"
echo "set-up: done"
