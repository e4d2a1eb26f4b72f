"""Perplexity of texts under a model, in windows of tokens."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.rollout import RolloutEngine


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-prob of a token, and of a word; bits a byte compare models of other tokenizers."""

    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    texts: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.texts} texts: perplexity {self.perplexity:.4f}, of words {self.word_perplexity:.4f}, "
            f"{self.bits_per_byte:.4f} bits a byte, {self.tokens:,} tokens"
        )


def windows(tokens: Sequence[int], prefix: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Windows of `size` + 1 tokens, and how many of their last ones count: every token counts once.

    `prefix` stands before the first token. The last window begins earlier rather than being short, as the rolling
    windows of lm-evaluation-harness do.
    """
    whole = [prefix, *tokens]
    for begin in range(0, len(tokens), size):
        end = min(begin + size, len(tokens))
        yield whole[max(0, end - size) : end + 1], end - begin


def perplexity(engine: RolloutEngine, tokenizer: Any, texts: Sequence[str], size: int) -> Perplexity:
    """Collective over all ranks, replicas share the windows; the begin- or else end-of-text token stands before a text.

    Raises:
        UserError: the texts have no tokens, or the tokenizer has neither of these tokens.
    """
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    if prefix is None or not (count := sum(map(len, encoded))):
        raise UserError("no perplexity: the texts have no tokens, or the tokenizer no begin- or end-of-text token")
    parts = [window for tokens in encoded for window in windows(tokens, prefix, size)]
    mine = parts[engine.replica :: engine.replicas]
    known = engine.prompt_logprobs([ids for ids, _ in mine])
    total = math.fsum(x for each, (_, counted) in zip(known, mine, strict=True) for x in each[-counted:])
    loss = -math.fsum(gathered(total)[:: engine.tensor])
    words, size = sum(len(re.split(r"\s+", text)) for text in texts), sum(len(text.encode()) for text in texts)
    return Perplexity(math.exp(loss / count), math.exp(loss / words), loss / math.log(2) / size, len(texts), count)
