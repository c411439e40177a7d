r"""A byte n-gram language model: how well does one text predict another, in bits per byte.

Interpolated Witten-Bell smoothing over contexts h of 0..order-1 bytes, T(h) distinct bytes having followed h:

    p(c | h) = (count(h, c) + T(h) p(c | h')) / (count(h) + T(h)),   p(c | no context left) = 1/256

where h' drops the oldest byte of h. Source: Witten & Bell, IEEE Trans. Inf. Theory 37(4), 1991; interpolated as in
Chen & Goodman, "An empirical study of smoothing techniques for language modeling", 1998, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from jaxtyping import Float

from salience.errors import InputError

_MAX_ORDER = 7  # the bytes of an n-gram and its length fit one 64-bit key, so that the table is exact
_SLOTS = 1 << 16  # of the table at first
_COUNT, _TOTAL, _FOLLOWERS = 0, 1, 2  # of an n-gram; of what followed it; of distinct bytes that followed it


class ByteNgram:
    """Byte n-gram model with Witten-Bell smoothing.

    Parameters
    ----------
    order : int
        Longest n-gram in bytes, 1..7.
    """

    def __init__(self, order: int = 5) -> None:
        if not 1 <= order <= _MAX_ORDER:
            raise InputError(f"order must lie in 1..{_MAX_ORDER}, not {order}")
        self.order = order

    def fit(self, texts: Sequence[bytes]) -> ByteNgram:
        """Count the n-grams of the texts; contexts do not cross from one text into the next."""
        data, offsets = _joined(texts)
        if not len(data):
            raise InputError("there is no text to fit on")
        self._keys, self._stats = _empty(_SLOTS)
        at = used = 0
        while at < len(data):
            at, used = _count(data, offsets, self.order, at, used, self._keys, self._stats)
            if at < len(data):
                keys, stats = _empty(4 * len(self._keys))
                _rehash(self._keys, self._stats, keys, stats)
                self._keys, self._stats = keys, stats
        return self

    def bits(self, texts: Sequence[bytes]) -> Float[np.ndarray, " texts"]:
        """Bits that the model needs for each text (divide by its length for bits per byte)."""
        data, offsets = _joined(texts)
        return _bits(data, offsets, self.order, self._keys, self._stats)


def _joined(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts], dtype=np.int64)])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


def _empty(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(size, np.uint64), np.zeros((size, 3), np.int32)


@numba.njit(nogil=True, cache=True)
def _slot(keys, key):
    """Where `key` stands in the open-addressing table, or the free slot where it would."""
    mask = np.uint64(len(keys) - 1)
    at = key * np.uint64(0x9E3779B97F4A7C15)
    at = (at ^ (at >> np.uint64(32))) & mask
    while keys[at] != 0 and keys[at] != key:
        at = (at + np.uint64(1)) & mask
    return at


@numba.njit(nogil=True, cache=True)
def _key(data, start, stop):
    """Length (from 1) in the top byte, then the bytes: exact up to seven of them."""
    key = np.uint64(0)
    for at in range(start, stop):
        key = key << np.uint64(8) | np.uint64(data[at])
    return key | np.uint64(stop - start + 1) << np.uint64(56)


@numba.njit(nogil=True, cache=True)
def _count(data, offsets, order, at, used, keys, stats):
    """Count from byte `at` on until the table is half full; gives the byte reached and the slots used."""
    text = np.searchsorted(offsets, at, side="right") - 1
    while at < len(data):
        while at >= offsets[text + 1]:
            text += 1
        if 2 * (used + 2 * order) > len(keys):
            break
        for length in range(min(order - 1, at - offsets[text]) + 1):
            context = _slot(keys, _key(data, at - length, at))
            if keys[context] == 0:
                keys[context] = _key(data, at - length, at)
                used += 1
            gram = _slot(keys, _key(data, at - length, at + 1))
            if keys[gram] == 0:
                keys[gram] = _key(data, at - length, at + 1)
                used += 1
            if stats[gram, _COUNT] == 0:
                stats[context, _FOLLOWERS] += 1
            stats[gram, _COUNT] += 1
            stats[context, _TOTAL] += 1
        at += 1
    return at, used


@numba.njit(nogil=True, cache=True)
def _rehash(old_keys, old_stats, keys, stats):
    for at in range(len(old_keys)):
        if old_keys[at] != 0:
            slot = _slot(keys, old_keys[at])
            keys[slot] = old_keys[at]
            stats[slot] = old_stats[at]


@numba.njit(nogil=True, cache=True)
def _bits(data, offsets, order, keys, stats):
    bits = np.zeros(len(offsets) - 1)
    for text in range(len(bits)):
        for at in range(offsets[text], offsets[text + 1]):
            probability = 1.0 / 256.0
            for length in range(min(order - 1, at - offsets[text]) + 1):
                context = _slot(keys, _key(data, at - length, at))
                if stats[context, _TOTAL] == 0:
                    break  # a context never seen: neither was any longer one
                gram = _slot(keys, _key(data, at - length, at + 1))
                distinct = stats[context, _FOLLOWERS]
                probability = (stats[gram, _COUNT] + distinct * probability) / (stats[context, _TOTAL] + distinct)
            bits[text] -= np.log2(probability)
    return bits
