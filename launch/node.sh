#!/usr/bin/env bash
# Runs this node's share of a job, here all of it:
#
#   bash launch/node.sh [options of torchrun and of node.py] COMMAND --config FILE key=value...
#   bash launch/node.sh --nproc-per-node 4 sft --config examples/sft.yaml output=runs/a
#
# A worker per GPU, or one without GPUs, unless --nproc-per-node says otherwise. `python launch/node.py --help`
# tells the options. PYTHON names the interpreter; without it, the repository's .venv, else python3.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$repository/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "launch: no Python at '$PYTHON': set PYTHON, or make the environment with 'bash tests/run.sh'" >&2
  exit 2
fi
# Programs of the environment, ninja among them, for what is compiled at run time; its CUDA, where there is no other.
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
export PATH
if [[ -z ${CUDA_HOME:-} ]] && ! command -v nvcc >/dev/null; then
  cuda=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
  if [[ -d $cuda ]]; then export CUDA_HOME=$cuda; fi
fi
# shellcheck disable=SC1091
source "$repository/launch/environment.sh"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" "$repository/launch/node.py" "$@"
