"""The reward `similarity` against what sacrebleu and rouge-score publish; skipped where they are not installed."""

from __future__ import annotations

import sys

import pytest

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards import Sample, load_rewards

SAID = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
WANTED = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]


def load(metric: str) -> object:
    return load_rewards([RewardConfig(name="similarity", args={"metric": metric})])[0].function


def test_bleu_and_chrf() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    bleu, chrf = load("bleu"), load("chrf")
    assert bleu.corpus(SAID, WANTED) * 100 == pytest.approx(sacrebleu.BLEU().corpus_score(SAID, [WANTED]).score)
    assert chrf.corpus(SAID, WANTED) * 100 == pytest.approx(sacrebleu.CHRF().corpus_score(SAID, [WANTED]).score)
    one = Sample([], "<think>x</think>" + SAID[0], WANTED[0])
    assert bleu(one) * 100 == pytest.approx(sacrebleu.sentence_bleu(SAID[0], [WANTED[0]]).score)
    assert chrf(Sample([], WANTED[1], WANTED[1])) == pytest.approx(1)


def test_rouge() -> None:
    pytest.importorskip("rouge_score.rouge_scorer")
    # Longest common subsequence of 5 words; 5 said, 6 wanted: F1 10/11.
    assert load("rougeL")(Sample([], SAID[0], WANTED[0])) == pytest.approx(10 / 11)
    assert load("rouge2")(Sample([], SAID[0], WANTED[0])) == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [("chrf", "sacrebleu", "sacrebleu"), ("rougeL", "rouge_score.rouge_scorer", "rouge-score")],
)
def test_a_library_that_is_not_there(metric: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"args.metric {metric}: .*; install it: pip install {package}$"):
        load(metric)
