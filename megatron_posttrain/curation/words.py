"""Words and n-grams of many texts at once, as 64-bit hashes in numpy arrays."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]
_ODD, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_SEPARATOR, _LETTER, _ALONE = 0, 1, 2
# By byte: operators of formulas are words, else "3 + 4" and "3 * 4" would be the same ones.
_KINDS = np.array([_LETTER if b > 127 or chr(b).isalnum() else _ALONE if b in b"+*/=<>^%" else _SEPARATOR for b in range(256)])  # fmt: skip # noqa: E501


def mixed(values: Hashes) -> Hashes:
    """A bijection of 64 bits after which every bit depends on every other (a round of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX
    return values ^ (values >> np.uint64(31))


def words(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """Hashes [words] of the words of all texts one after the other, and offsets [texts + 1] of each text's.

    Case and punctuation are left out. A word is a run of letters and digits, an operator, or one Chinese, Japanese
    or Korean character.
    """
    encoded = [text.lower().encode("utf-8", "replace") for text in texts]
    ends = np.cumsum([len(text) + 1 for text in encoded])
    data = np.frombuffer(b"\n".join(encoded) + b"\n", np.uint8)
    kinds = _KINDS[data]
    after = np.append(data[1:], np.uint8(0))
    # Punctuation beyond ASCII: the blocks U+0080 (two bytes), U+2000, U+3000 and U+FF00 (three).
    long = np.flatnonzero((data == 0xE2) | (data == 0xEF) | ((data == 0xE3) & (after == 0x80)))
    for index in (np.flatnonzero(data == 0xC2), long):
        kinds[index] = kinds[index + 1] = _SEPARATOR
    kinds[long + 2] = _SEPARATOR
    before = np.append(_SEPARATOR, kinds[:-1])
    starts = (kinds > 0) & ((before != kinds) | (kinds == _ALONE) | ((data >= 0xE3) & (data <= 0xED)))
    letters, begins = np.flatnonzero(kinds), np.flatnonzero(starts)
    if not len(begins):
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
    first = np.flatnonzero(starts[letters])  # of each word, among the letters
    sizes = np.diff(np.append(first, len(letters)))
    powers = np.cumprod(np.full(int(sizes.max()) + 1, _ODD))
    place = np.arange(len(letters)) - np.repeat(first, sizes)
    hashes = mixed(np.add.reduceat((data[letters].astype(np.uint64) + np.uint64(1)) * powers[place], first))
    return hashes, np.append(0, np.searchsorted(begins, ends))


def common_subsequence(one: Hashes, two: Hashes) -> int:
    """Length of the longest common subsequence of two texts' words, by bits (Hyyroe 2004)."""
    places: dict[int, int] = defaultdict(int)
    for place, word in enumerate(one.tolist()):
        places[word] |= 1 << place
    full = row = (1 << len(one)) - 1
    for word in two.tolist():
        found = row & places.get(word, 0)
        row = (row + found | row - found) & full
    return (full ^ row).bit_count()


def text_of_word(offsets: Offsets) -> Offsets:
    """[words] the number of the text that a word is of."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def ngrams(hashes: Hashes, offsets: Offsets, n: int) -> tuple[Hashes, NDArray[np.bool_]]:
    """[words] the hash of the n words that begin at each, and whether all of them are of its text.

    Where a text ends before them, its end counts as a word, so that a short text has n-grams too.
    """
    text = text_of_word(offsets)
    places = np.arange(len(hashes)) + text * (n - 1)
    padded = np.zeros(len(hashes) + (len(offsets) - 1) * (n - 1) + n, np.uint64)
    padded[places] = hashes
    grams = np.zeros(len(padded) - n + 1, np.uint64)
    for k in range(n):
        grams = grams * _ODD + padded[k : len(grams) + k]
    return mixed(grams[places]), np.arange(len(hashes)) + n <= offsets[1:][text]
