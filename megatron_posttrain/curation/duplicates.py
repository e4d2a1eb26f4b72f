"""Near duplicates by MinHash and locality-sensitive hashing."""

import numpy as np
from numpy.typing import NDArray

from megatron_posttrain.curation.words import Hashes, Offsets, mixed

PERMUTATIONS = 128
SHINGLE = 5  # words
_RECALL = 0.99  # of pairs exactly at the threshold, by bands


class NearDuplicates:
    """Texts whose sets of 5-word shingles have a Jaccard similarity of `threshold` or more with an earlier text's.

    Candidates share a band of their signatures (Leskovec et al., Mining of Massive Datasets, section 3.4); their
    similarity is then estimated from the lowest 8 bits of all 128 minima (b-bit minwise hashing, Li and Koenig 2010):
    its standard error is 0.035 at 0.8. A text takes 128 bytes and 8 a band.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        # The longest bands, so the fewest candidates, that still find nearly all pairs.
        found = [r for r in range(1, 33) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _RECALL]
        self._rows = max(found, default=1)
        random = np.random.default_rng(0)
        self._factors = random.integers(0, 1 << 32, PERMUTATIONS, np.uint32) | np.uint32(1)
        self._terms = random.integers(0, 1 << 32, PERMUTATIONS, np.uint32)
        self._keys: list[Hashes] = []
        self._low: list[NDArray[np.uint8]] = []

    def add(self, shingles: Hashes, offsets: Offsets) -> None:
        """Texts of at least one word; `shingles[offsets[i]:offsets[i + 1]]` are text i's."""
        if len(offsets) == 1:  # nothing of a batch passed the other rules
            return
        short = (shingles >> np.uint64(32)).astype(np.uint32)
        minima = np.empty((PERMUTATIONS, len(offsets) - 1), np.uint32)
        for k in range(PERMUTATIONS):
            np.minimum.reduceat(short * self._factors[k] + self._terms[k], offsets[:-1], out=minima[k])
        bands = minima[: PERMUTATIONS // self._rows * self._rows].reshape(-1, self._rows, len(offsets) - 1)
        keys = np.zeros((len(bands), len(offsets) - 1), np.uint64)
        for row in range(self._rows):
            keys = mixed(keys + bands[:, row] + np.uint64(1))
        self._keys.append(keys)
        self._low.append((minima & np.uint32(255)).astype(np.uint8).T)

    def find(self) -> dict[int, int]:
        """Each text that repeats an earlier one that stays, by number, and that one."""
        if not self._keys:
            return {}
        keys, low = np.concatenate(self._keys, axis=1), np.concatenate(self._low)
        twin: dict[int, int] = {}
        for earlier, later in self._pairs(keys).tolist():
            kept = twin.get(earlier, earlier)
            if later not in twin and kept != later:
                same = float((low[kept] == low[later]).mean())
                if (same - 1 / 256) / (1 - 1 / 256) >= self._threshold:
                    twin[later] = kept
        return twin

    def _pairs(self, keys: Hashes) -> NDArray[np.int64]:
        """[pairs, 2] candidates, sorted by the later text: each in a bucket with the first and the one before it."""
        count = keys.shape[1]
        found = [np.empty(0, np.int64)]
        for band in keys:
            order = np.argsort(band, kind="stable")
            begins = np.append(True, band[order][1:] != band[order][:-1])
            place = np.flatnonzero(~begins)
            first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
            for other in (place - 1, first[place]):
                found.append(order[place] * count + order[other])
        later, earlier = np.divmod(np.unique(np.concatenate(found)), max(1, count))
        return np.stack([earlier, later], axis=1)
