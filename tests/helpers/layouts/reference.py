"""What transformers and torch's AdamW say: log-probs, losses and gradient norms, one sequence at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.helpers.layouts.worker import SCORED, batch, sequences


def logprobs(directory: str) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for sequence in sequences(SCORED, 7, model.config.vocab_size):
            ids = torch.tensor(sequence.token_ids).long()[None]
            values = model(ids).logits[0].log_softmax(-1)[:-1]
            found.append(values.gather(1, ids[0, 1:, None])[:, 0])
    return found


def train(directory: str, steps: int, count: int = 4) -> tuple[list[float], list[float]]:
    """The loss is one mean over the global batch, plus each row's balancing loss (Switch, arXiv 2101.03961, eq. 4)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = model.config
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    experts = getattr(config, "num_experts", 0)
    losses, norms = [], []
    for step in range(steps):
        rows = batch(step, config.vocab_size, count)
        counted = sum(sum(s.loss_mask) for row in rows for s in row)
        total = 0.0
        for row in rows:
            routers: list[tuple[Tensor, ...]] = []
            loss = torch.zeros(())
            for sequence in row:
                ids = torch.tensor(sequence.token_ids).long()
                mask = torch.tensor(sequence.loss_mask)[1:]
                out = model(ids[None], **({"output_router_logits": True} if experts else {}))
                nll = F.cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")
                loss = loss + (nll * mask).sum() / counted
                routers.append(out.router_logits if experts else ())
            total += loss.item()
            if experts:
                loss = loss + balancing(routers, config.num_experts_per_tok, config.router_aux_loss_coef) / len(rows)
            loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def balancing(routers: list[tuple[Tensor, ...]], top_k: int, coefficient: float) -> Tensor:
    total = torch.zeros(())
    for layer in zip(*routers, strict=True):
        logits = torch.cat([x.reshape(-1, x.shape[-1]) for x in layer])
        tokens, experts = logits.shape
        chosen = F.one_hot(logits.topk(top_k, -1).indices, experts).sum((0, 1)).float() / (tokens * top_k)
        total = total + coefficient * experts * (chosen * logits.softmax(-1).mean(0)).sum()
    return total


def largest_difference(found: list[list[float]], expected: list[Tensor]) -> float:
    flat = list(itertools.chain.from_iterable(found))
    return (torch.tensor(flat) - torch.cat(expected)).abs().max().item()
