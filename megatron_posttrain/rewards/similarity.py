"""How near an answer's text is to a reference: BLEU, chrF and ROUGE, by the libraries that published figures use."""

from collections.abc import Sequence
from typing import Any, Literal

from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.registry import Sample, reward


@reward("similarity", needs_answer=True)
class Similarity:
    """Likeness of the answer to the row's, from 0 to 1, by sacrebleu (bleu, chrf) or rouge-score (F1, with stemming).

    `evaluate` tells that of all answers together too, which is what is published: of BLEU and chrF it is no mean.
    """

    def __init__(self, *, metric: Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL"] = "rougeL") -> None:
        self._metric = metric
        try:
            if metric in ("bleu", "chrf"):
                import sacrebleu

                self._library: Any = sacrebleu
            else:
                from rouge_score.rouge_scorer import RougeScorer

                self._library = RougeScorer([metric], use_stemmer=True)
        except ImportError as error:
            package = "sacrebleu" if metric in ("bleu", "chrf") else "rouge-score"
            raise UserError(
                f"rewards: 'similarity': args.metric {metric}: {error}; install it: pip install {package}"
            ) from None

    def __call__(self, sample: Sample) -> float:
        return self.corpus([sample.final or ""], [sample.answer or ""], f"sentence_{self._metric}")

    def corpus(self, answers: Sequence[str], references: Sequence[str], function: str | None = None) -> float:
        """Of all answers together."""
        if self._metric.startswith("rouge"):
            pairs = zip(references, answers, strict=True)
            return sum(float(self._library.score(*pair)[self._metric].fmeasure) for pair in pairs) / len(answers)
        if function:
            return float(getattr(self._library, function)(answers[0], references).score) / 100
        return float(getattr(self._library, f"corpus_{self._metric}")(answers, [references]).score) / 100
