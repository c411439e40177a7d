"""The compiled kernels of the hashed n-gram features: from Arrow's UTF-8 buffers to bucket numbers, counts and sums.

Tokens and n-grams have 64-bit fingerprints. They decide the buckets of ``hash="fast"``, and tell ``hash="sha256"``
which n-grams it has hashed before; two n-grams of a corpus share one by chance only, once in 2^64 pairs.
"""

from __future__ import annotations

import numba
import numpy as np

from salience.data.dsir.sha256 import sha256_mod
from salience.data.dsir.tokens import split
from salience.io.words import load_shared, load_word, store_shared

_A, _B, _C = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_HALF, _MASKS = np.uint64(32), np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


@numba.njit(nogil=True, cache=True)
def _bytes(low, at, count):
    """The first `count` of the eight bytes at `at`; none for a `count` below 0."""
    return load_word(low, at) & _MASKS[min(max(count, 0), 8)]


@numba.njit(nogil=True, cache=True)
def _fingerprint(low, starts, stops, count, keys, grams):
    """Fingerprints of tokens, twice; their lengths tell "a" from "a" and a zero byte.

    Two words are always read, as few tokens are longer: a loop over words would be foreseen wrongly every tenth time.
    """
    for t in range(count):
        at = starts[t]
        length = stops[t] - at
        key = (np.uint64(length) * _A ^ _bytes(low, at, length)) * _B
        key = (key ^ key >> _HALF ^ _bytes(low, at + 8, length - 8)) * _C
        while length > 16:
            at, length = at + 8, length - 8
            key = (key ^ key >> _HALF ^ _bytes(low, at + 8, length - 8)) * _B
        keys[t] = grams[t] = key ^ key >> _HALF


@numba.njit(nogil=True, cache=True)
def _lengthen(grams, keys):
    """Make n-grams one token longer: gram t takes the token behind it."""
    for t in range(len(grams)):
        gram = (grams[t] * _A ^ keys[t]) * _B
        grams[t] = gram ^ gram >> _HALF


@numba.njit(nogil=True, cache=True)
def _keys(data, here, stop, characters, low, kind, starts, stops, keys, grams):
    """Split a document; its tokens' fingerprints, twice. Gives their number, or -1 (see split)."""
    count = split(data, here, stop, characters, low, kind, starts, stops)
    if count > 0:
        _fingerprint(low, starts, stops, count, keys, grams)
    return count


# One function for each kind of number, because a choice within the inner loops would keep them from vectorising. All
# write, document by document, the numbers of its single tokens, then those of its pairs, and so on.


@numba.njit(nogil=True, cache=True)
def fingerprints(data, offsets, characters, ngrams, low, kind, starts, stops, keys, grams, ids, id_offsets, tokens):
    """The fingerprints themselves."""
    written = 0
    for d in range(len(tokens)):
        count = _keys(data, offsets[d], offsets[d + 1], characters, low, kind, starts, stops, keys, grams)
        for size in range(1, min(ngrams, count) + 1):
            found = count - size + 1
            if size > 1:
                _lengthen(grams[:found], keys[size - 1 : count])
            ids[written : written + found] = grams[:found]
            written += found
        id_offsets[d + 1], tokens[d] = written, count


@numba.njit(nogil=True, cache=True)
def _scale(grams, num_buckets, ids):
    for t in range(len(grams)):
        ids[t] = (grams[t] >> _HALF) * num_buckets >> _HALF


@numba.njit(nogil=True, cache=True)
def fast_buckets(
    data, offsets, characters, ngrams, num_buckets, low, kind, starts, stops, keys, grams, ids, id_offsets, tokens
):
    """The upper halves of the fingerprints, scaled to the number of buckets."""
    written = 0
    for d in range(len(tokens)):
        count = _keys(data, offsets[d], offsets[d + 1], characters, low, kind, starts, stops, keys, grams)
        for size in range(1, min(ngrams, count) + 1):
            found = count - size + 1
            if size > 1:
                _lengthen(grams[:found], keys[size - 1 : count])
            _scale(grams[:found], np.uint64(num_buckets), ids[written : written + found])
            written += found
        id_offsets[d + 1], tokens[d] = written, count


@numba.njit(nogil=True, cache=True)
def exact_buckets(
    data, offsets, characters, ngrams, num_buckets, low, kind, starts, stops, keys, grams, ids, id_offsets, tokens,
    memo, message,
):  # fmt: skip
    """SHA-256 modulo the number of buckets.

    `memo` remembers n-grams hashed before, by all threads. An entry is one word, so that none is ever seen half
    written: the upper bits of the fingerprint, whose lower bits say where it stands, and the bucket. More buckets than
    it has entries would not fit: then all n-grams are hashed.
    """
    written, slots, fits = 0, np.uint64(len(memo) - 1), num_buckets <= len(memo)
    for d in range(len(tokens)):
        count = _keys(data, offsets[d], offsets[d + 1], characters, low, kind, starts, stops, keys, grams)
        for size in range(1, min(ngrams, count) + 1):
            found = count - size + 1
            if size > 1:
                _lengthen(grams[:found], keys[size - 1 : count])
            for t in range(found):
                slot = np.int64(grams[t] & slots)
                entry = load_shared(memo, slot)
                bucket = entry & slots
                if not fits or (entry ^ grams[t]) > slots:
                    bucket = sha256_mod(message, _write(low, starts, stops, t, t + size, message), num_buckets)
                    if fits:
                        store_shared(memo, slot, (grams[t] & ~slots) | bucket)
                ids[written + t] = bucket
            written += found
        id_offsets[d + 1], tokens[d] = written, count


@numba.njit(nogil=True, cache=True)
def _write(low, starts, stops, first, last, message):
    """Write the tokens first .. last, joined by one space; gives the length."""
    length = 0
    for t in range(first, last):
        for at in range(starts[t], stops[t]):
            message[length] = low[at]
            length += 1
        message[length] = 32
        length += 1
    return length - 1


@numba.njit(nogil=True, cache=True)
def count_ids(ids, counts):
    """Count bucket numbers in place."""
    for position in range(len(ids)):
        counts[ids[position]] += 1


@numba.njit(nogil=True, cache=True)
def segment_sums(ids, offsets, table):
    """Sum a value per bucket over each document, for every row of the table."""
    sums = np.zeros((len(offsets) - 1, len(table)))
    for document in range(len(sums)):
        for column in range(len(table)):
            total = 0.0
            for position in range(offsets[document], offsets[document + 1]):
                total += table[column, ids[position]]
            sums[document, column] = total
    return sums
