#!/usr/bin/env bash
# A recipe from end to end, its table and its report: bash examples/recipes/run.sh classic | deepseek_r1 | qwen3 toy
# [key.sub=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?which recipe: classic, deepseek_r1, qwen3}
shift
file=examples/recipes/$name/${1:?which size of $name: toy, one_node, many_nodes}.yaml
shift
[ -x .venv/bin/python ] || bash tools/setup.sh
if [[ $file == */@(toy|smollm2).yaml && ! -d build/quantize/llmcompressor ]]; then # without it its stages are left out
    .venv/bin/pip install --quiet --no-deps --target build/quantize -r requirements/quantize.txt || true
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
output=$(sed -n 's/^output: *//p' "$file")
for word in "$@"; do [[ $word != output=* ]] || output=${word#output=}; done
started=$SECONDS
status=0
.venv/bin/python -m megatron_posttrain pipeline "$file" "$@" || status=$?
[ -f "$output/pipeline.json" ] || exit "$status"
evaluated=("$output"/evaluate*/)
[ ! -d "${evaluated[0]}" ] || .venv/bin/python -m megatron_posttrain evaluate --leaderboard "${evaluated[@]%/}"
.venv/bin/python -m megatron_posttrain report "$output"
printf '%s: status %d after %d min %d s; CPU time, user and system, of this shell and of all else:\n' "$name" "$status" $(((SECONDS - started) / 60)) \
    $(((SECONDS - started) % 60))
times
exit "$status"
