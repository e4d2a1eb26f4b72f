"""Run by a check as a process that sees no GPU: log-probs of given weights, torch layers, fp32.

python -m benchmarks.gpu_check.reference INPUT.pt OUTPUT.pt
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu_check import subjects
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.sequences import sequence_logprobs


def main() -> None:
    name, hidden, weights = torch.load(sys.argv[1], weights_only=True)
    arch = subjects.shrunk(name, hidden)
    engine = Engine.of(subjects.config("torch", "fp32"), arch, subjects.groups(), train=False)
    subjects.fill(engine, weights)
    torch.save(sequence_logprobs(engine, subjects.sequences(4, 48, arch.vocab_size, 0), 96), sys.argv[2])


if __name__ == "__main__":
    main()
