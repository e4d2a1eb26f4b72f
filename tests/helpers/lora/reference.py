"""What PEFT says: losses of the same adapter trained in transformers, one sequence at a time, and merged log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.helpers.layouts.worker import SCORED, batch, sequences
from tests.helpers.lora.worker import EPSILON, LR, ROWS


def load(base: str, adapter: Path, *, trainable: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)


def train(base: str, adapter: Path, steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms; the loss is one mean over the tokens of the global batch."""
    model = load(base, adapter, trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPSILON)
    losses, norms = [], []
    for step in range(steps):
        rows = [s for row in batch(step, model.config.vocab_size, ROWS) for s in row]
        counted, total = sum(sum(s.loss_mask) for s in rows), 0.0
        for sequence in rows:
            ids, mask = torch.tensor(sequence.token_ids).long(), torch.tensor(sequence.loss_mask)[1:]
            nll = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            loss = (nll * mask).sum() / counted
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@torch.no_grad()
def logprobs(model: Any) -> list[Tensor]:
    found = []
    for sequence in sequences(SCORED, 7, model.config.vocab_size):
        ids, mask = torch.tensor(sequence.token_ids).long(), torch.tensor(sequence.loss_mask)[1:]
        values = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        found.append(values * mask)
    return found
