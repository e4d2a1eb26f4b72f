"""Rows that share n-grams of words with prompts of evaluation files."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_posttrain.curation.words import Hashes, Offsets, common_subsequence, ngrams, text_of_word, words
from megatron_posttrain.data.columns import Columns
from megatron_posttrain.data.rows import Reader, read_records
from megatron_posttrain.errors import UserError

_BITS = np.uint64(24)  # of a table that tells nearly all n-grams apart from those of the evaluation


class Contamination:
    """Finds rows in which at least `overlap` of the words of an evaluation prompt lie in n-grams that both have.

    `overlap` 0: one n-gram is enough, as for GPT-3 (13 words), DeepSeek-R1 (10) and Open-R1 (8); 0.5 with 8 words is
    the rule of Tulu 3 and OLMo 3. `lcs`: of those, rows whose longest common subsequence with the prompt has at least
    that share of its words; 0.6 with 13 words is Qwen2.5-Math's rule. A prompt shorter than n words is compared with
    nothing, and counted.
    """

    def __init__(
        self, files: Sequence[str], n: int, overlap: float, lcs: float | None = None, columns: Columns | None = None
    ) -> None:
        self._n, self._overlap, self._lcs = n, overlap, lcs
        self._sources: list[str] = []
        self.files: list[tuple[str, range]] = []
        texts: list[str] = []
        for file in files:
            before = len(texts)
            for row, _ in read_records(file, Reader(columns or {}, "any")):
                texts.append("\n".join(str(m["content"]) for m in row.messages if m["role"] == "user"))
                self._sources.append(row.source)
            if len(texts) == before:
                raise UserError(f"{file}: no rows in it")
            self.files.append((file, range(before, len(texts))))
        hashes, offsets = words(texts)
        self._prompts = np.split(hashes, offsets[1:-1])
        self._sizes = np.diff(offsets)
        grams, whole = ngrams(hashes, offsets, n)
        item = text_of_word(offsets)
        position = np.arange(len(hashes)) - offsets[item]
        order = np.argsort(grams[whole], kind="stable")
        self._grams, self._items, self._positions = (array[whole][order] for array in (grams, item, position))
        self._table = np.zeros(1 << int(_BITS), np.bool_)
        self._table[self._grams >> (np.uint64(64) - _BITS)] = True
        self.hit: set[int] = set()  # prompts that a row shared enough with

    def find(self, hashes: Hashes, offsets: Offsets) -> dict[int, str]:
        """Contaminated texts of a batch, by number, and the `file:line` of the prompt that they share most with."""
        grams, whole = ngrams(hashes, offsets, self._n)
        maybe = np.flatnonzero(whole & self._table[grams >> (np.uint64(64) - _BITS)])
        first, end = (np.searchsorted(self._grams, grams[maybe], side) for side in ("left", "right"))
        covered: dict[tuple[int, int], set[int]] = defaultdict(set)
        text = text_of_word(offsets)
        for row, a, b in zip(text[maybe].tolist(), first.tolist(), end.tolist(), strict=True):
            for item, position in zip(self._items[a:b].tolist(), self._positions[a:b].tolist(), strict=True):
                covered[row, item].update(range(position, position + self._n))
        shares: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for (row, item), places in covered.items():
            if (share := len(places) / int(self._sizes[item])) < self._overlap:
                continue
            if self._lcs is not None:
                words_of_row = hashes[offsets[row] : offsets[row + 1]]
                share = common_subsequence(self._prompts[item], words_of_row) / int(self._sizes[item])
            if self._lcs is None or share >= self._lcs:
                shares[row].append((share, item))
                self.hit.add(item)
        most = {row: max(found, key=lambda pair: (pair[0], -pair[1])) for row, found in shares.items()}
        return {row: f"{share:.0%} of the words of {self._sources[item]}" for row, (share, item) in most.items()}

    def report(self) -> list[dict[str, int | str]]:
        """Of each evaluation file: its prompts, those that rows share enough with, and those too short to tell."""
        return [
            {
                "file": file, "prompts": len(prompts), "contaminated": len(self.hit.intersection(prompts)),
                "too_short": int((self._sizes[prompts.start : prompts.stop] < self._n).sum()),
            }
            for file, prompts in self.files
        ]  # fmt: skip
