"""Log-probabilities of given conversations, under any layout: how the trainer is checked from outside."""

import json

import torch.distributed as dist

from megatron_posttrain.config.algorithms import ScoreConfig
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.data.tokenize import encode_row
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.limits import check_positions
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.sequences import sequence_logprobs


def score(config: ScoreConfig) -> int:
    """Writes OUTPUT/scores.jsonl: `{"index", "token_ids", "logprobs"}`, one log-prob fewer than tokens."""
    prepared = prepare(config)
    rows = read_rows(config.data.sources, columns=config.data.columns)
    token_ids = [encode_row(prepared.tokenizer, row, config.data.omissions).token_ids for row in rows]
    limit = config.data.sequence_length
    for row, ids in zip(rows, token_ids, strict=True):
        if len(ids) > limit:
            raise UserError(f"{row.source}: {len(ids)} tokens, data.sequence_length allows {limit}")
    check_positions(map(len, token_ids), prepared.arch)
    start_distributed()
    groups = make_groups(prepared.layout, config.training.seed)
    engine = Engine.of(config, prepared.arch, groups, train=False)
    sequences = [TokenSequence(ids, [1] * len(ids)) for ids in token_ids]
    outputs = sequence_logprobs(
        engine, sequences, limit * config.training.micro_batch_size if config.data.packing else max(map(len, token_ids))
    )
    if dist.get_rank() == 0:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        path = config.output_dir / "scores.jsonl"
        with path.open("w") as file:
            for index, (ids, values) in enumerate(zip(token_ids, outputs, strict=True)):
                file.write(json.dumps({"index": index, "token_ids": ids, "logprobs": values.tolist()}) + "\n")
        print(f"wrote {path}: {len(token_ids)} conversations, {sum(map(len, token_ids)):,} tokens", flush=True)
    dist.barrier()
    return 0
