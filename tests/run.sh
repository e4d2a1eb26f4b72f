#!/usr/bin/env bash
# The set-up, then lint, types and tests. Arguments go to pytest: tests/run.sh -k layout
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    .venv/bin/shellcheck tools/*.sh tests/run.sh examples/*.sh .ci/run
fi
exec .venv/bin/python -m pytest "$@"
