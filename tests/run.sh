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
    git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 .venv/bin/shellcheck
fi
# Most tests are several processes that wait for each other: three files at a time keep two cores busy; in the order
# of tests/conftest.py.
[ $# -gt 0 ] || set -- --numprocesses 3 --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest "$@"
