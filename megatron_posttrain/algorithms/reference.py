"""The reference model's log-probs: computed once with the weights that a run begins with, and kept on disk."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_posttrain.algorithms.preferences import answer_logprobs, score_sequences, sequences_of, token_budget
from megatron_posttrain.config.algorithms import DpoConfig
from megatron_posttrain.data.pairs import PreferenceDataset
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.training.engine import LABEL_LOGPROBS, Engine
from megatron_posttrain.training.prepare import Prepared
from megatron_posttrain.training.resume import fingerprint_of_config, fingerprint_of_weights
from megatron_posttrain.training.run import Run

REFERENCE = "reference"  # the weight set
ROWS_AT_A_TIME = 1024


class ReferenceLogprobs:
    """Of every conversation of a dataset the log-probs of its answer, summed; NaN where nothing asked for it yet.

    Raises UserError where the file has those of another model, tokenizer, template, truncation or other rows.
    """

    def __init__(self, file: Path, prepared: Prepared, dataset: PreferenceDataset) -> None:
        self.file, self.dataset = file, dataset
        self.key = cache_key(prepared, dataset)
        self.values = torch.full((len(dataset), 2), torch.nan)
        if file.exists():
            with np.load(file) as stored:
                self._check(json.loads(str(stored["key"])))
                self.values = torch.from_numpy(stored["values"])

    def _check(self, key: dict[str, str]) -> None:
        if wrong := [name for name, value in self.key.items() if key.get(name) != value]:
            raise UserError(
                f"{self.file} has log-probs for another {', '.join(wrong)} than this run's; remove it, or give this "
                "run a directory of its own in algorithm.reference_cache"
            )

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Collective: the rows that are not known, as rank 0 sees its file."""
        self.values = torch.as_tensor(broadcast_object(self.values.numpy()))
        unknown = self.values.isnan().any(-1).tolist()
        return sorted({row for row in rows if unknown[row]})

    def compute(self, engine: Engine, rows: list[int], run: Run) -> None:
        """Collective: those of `rows`, under the present weights of `engine`; written by rank 0."""
        budget = token_budget(run.config)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[start : start + ROWS_AT_A_TIME]
            units = sequences_of([self.dataset.preferences[row] for row in part])
            flat = [sequence for unit in units for sequence in unit]
            found = score_sequences(engine, flat, budget, LABEL_LOGPROBS, answer_logprobs)
            self.values[part] = found.view(-1, 2)
            run.say(f"reference log-probs of {start + len(part):,} of {len(rows):,} rows")
        if run.is_main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_name(f".{self.file.name}.partial.npz")
            np.savez(partial, key=json.dumps(self.key), values=self.values.numpy())
            partial.replace(self.file)

    def of(self, rows: list[int]) -> Tensor:
        """[rows, 2]."""
        return self.values[rows]


def cache_key(prepared: Prepared, dataset: PreferenceDataset) -> dict[str, str]:
    """All that the log-probs depend on, by the names that a message gives."""
    config = prepared.config

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    seed, path = config.training.seed, prepared.model_path
    weights = f" random {seed}" if config.model.random_init else fingerprint_of_weights(path)
    return {
        "model": fingerprint_of_config(path) + weights,
        "precision": config.precision.model_dump_json(),
        "tokenizer": short(prepared.tokenizer.backend_tokenizer.to_str()),
        "template": short(str(prepared.tokenizer.chat_template)),
        "truncation": f"{config.data.sequence_length} {config.data.overlong}",
        "rows": dataset.fingerprint,  # tokens, and which of them count
    }


def reference_directory(config: DpoConfig) -> Path:
    return Path(config.algorithm.reference_cache or config.output_dir / "reference")
