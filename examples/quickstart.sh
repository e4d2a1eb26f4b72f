#!/usr/bin/env bash
# From a fresh clone: a small Qwen3-MoE model learns two-digit addition by SFT, then by GRPO with vLLM
# rollouts, under tensor x pipeline x expert parallelism in four processes. About four minutes on two idle cores.
#   bash examples/quickstart.sh [key.sub=value ...]      SEED=1 RUN=runs/other for another seed and place
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
SEED=${SEED:-0}
RUN=${RUN:-runs/quickstart}
started=$SECONDS
python=.venv/bin/python
rm -rf "$RUN"

run() { # processes, command, arguments
    local n=$1
    shift
    .venv/bin/torchrun --standalone --nproc-per-node "$n" -m megatron_posttrain "$@"
}

title() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }

title "model, tokenizer and data"
"$python" examples/quickstart/make_assets.py "$RUN/assets" --seed "$SEED"

title "SFT: tensor 2 x pipeline 2 x expert 2"
run 4 sft --config examples/quickstart/sft.yaml training.seed="$SEED" \
    model.path="$RUN/assets/model" data.train="$RUN/assets/train.jsonl" output="$RUN/sft" "$@"

title "GRPO: the same layout, a vLLM engine in every rank"
run 4 grpo --config examples/quickstart/grpo.yaml training.seed="$SEED" \
    model.path="$RUN/sft/hf" data.train="$RUN/assets/rl.jsonl" output="$RUN/grpo" "$@"

title "held-out accuracy, one conversation from transformers and one from vLLM"
mkdir -p "$RUN/evaluation"
jobs=()
for pair in before:assets/model sft:sft/hf grpo:grpo/hf; do
    "$python" -m megatron_posttrain evaluate --model "$RUN/${pair#*:}" --data "$RUN/assets/heldout.jsonl" \
        --max-tokens 48 --dtype fp32 --output "$RUN/evaluation/${pair%%:*}" >"$RUN/evaluation/${pair%%:*}.log" 2>&1 &
    jobs+=($!)
done
for job in "${jobs[@]}"; do
    wait "$job" || { tail -n 20 "$RUN"/evaluation/*.log >&2; exit 1; }
done
"$python" examples/quickstart/summary.py "$RUN" --seed "$SEED" --seconds $((SECONDS - started))
