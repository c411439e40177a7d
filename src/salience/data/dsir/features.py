r"""Hashed n-gram features: the bag of buckets that DSIR weighs text by.

A document is lower-cased, split by ``\w+|[^\w\s]+`` (NLTK's WordPunctTokenizer), and every run of 1..n tokens,
joined by one space, falls into the bucket

    bucket(s) = int(sha256(utf-8(s)), 16) mod B            (exact; `hash="sha256"`)
    bucket(s) = floor(mix64(s) / 2^32 * B / 2^32)          (`hash="fast"`, explicit only)

`z(x) in N^B` counts them. The kernel below reads Arrow's UTF-8 buffers; `reference_buckets` is its readable twin.

Source: Xie, Santurkar, Ma, Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023,
section 4; bucket numbers as in the official package `data-selection` 1.0.3.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt32

from salience.errors import InputError

_TOKEN = re.compile(r"\w+|[^\w\s]+", re.UNICODE | re.MULTILINE | re.DOTALL)
_SPACE, _WORD, _OTHER = 0, 1, 2
_SIGMA, _DOTTED_I = 0x3A3, 0x130
_MEMO_BITS = 20
_MODES = {"sha256": 0, "fast": 1, "keys": 2}


class Buckets(NamedTuple):
    """The n-grams of a batch of documents, as bucket numbers in reading order.

    Attributes
    ----------
    ids : (total,) int32 or uint16
        Bucket of every n-gram; document i owns ``ids[offsets[i]:offsets[i + 1]]``.
    offsets : (documents + 1,) int64
    tokens : (documents,) int64
        Number of tokens of each document.
    """

    ids: Int[np.ndarray, " total"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    tokens: Int[np.ndarray, " documents"]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.ids.nbytes + self.offsets.nbytes + self.tokens.nbytes

    def compact(self, num_buckets: int) -> Buckets:
        """The same in half the memory, where bucket numbers fit 16 bits."""
        return self._replace(ids=self.ids.astype(np.uint16 if num_buckets <= 1 << 16 else np.int32))

    def counts(self, num_buckets: int) -> Int[np.ndarray, " num_buckets"]:
        """Sum the batch's documents into one count vector (n-grams per bucket)."""
        return np.bincount(self.ids, minlength=num_buckets)

    def sums(self, table: Float[np.ndarray, "columns num_buckets"]) -> Float[np.ndarray, "documents columns"]:
        """Sum a value per bucket over the n-grams of each document: `table @ z(x)` for every x."""
        return _segment_sums(self.ids, self.offsets, np.ascontiguousarray(table, dtype=np.float64))


class HashedNgrams:
    """Turn texts into hashed n-gram buckets.

    Parameters
    ----------
    ngrams : int
        Longest n-gram n; all of 1..n are counted.
    num_buckets : int
        B, the size of the hash table.
    hash : {"sha256", "fast"}
        "sha256" gives the published bucket numbers; "fast" is quicker and gives others.
    tokenizer : callable, optional
        ``str -> list of str``, used after lower-casing instead of the built-in word/punctuation split (slow: plain
        Python; sha256 only). The paper's own runs used NLTK's ``word_tokenize``.

    Raises
    ------
    InputError
        A parameter out of range.
    """

    def __init__(
        self,
        ngrams: int = 2,
        num_buckets: int = 10_000,
        hash: str = "sha256",
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> None:
        if ngrams < 1:
            raise InputError(f"ngrams must be at least 1, not {ngrams}")
        if not 1 <= num_buckets < 2**31:
            raise InputError(f"num_buckets must lie in 1..2^31 - 1, not {num_buckets}")
        if hash not in ("sha256", "fast"):
            raise InputError(f"hash must be 'sha256' or 'fast', not {hash!r}")
        if tokenizer is not None and hash == "fast":
            raise InputError("hash='fast' works with the built-in tokenizer only; use hash='sha256'")
        self.ngrams, self.num_buckets, self.hash, self.tokenizer = ngrams, num_buckets, hash, tokenizer

    def __call__(self, texts: pa.Array | Sequence[str]) -> Buckets:
        """Hash the n-grams of every text.

        Parameters
        ----------
        texts : Arrow string array or sequence of str, (documents,)
            No nulls; valid Unicode.
        """
        if self.tokenizer is None:
            return _hash(texts, self.ngrams, self.num_buckets, self.hash)
        strings = texts.to_pylist() if isinstance(texts, pa.Array) else texts
        tokens = [self.tokenizer(text.lower()) for text in strings]
        ids = [reference_buckets(words, self.ngrams, self.num_buckets) for words in tokens]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)])
        flat = np.fromiter((bucket for row in ids for bucket in row), dtype=np.int32, count=int(offsets[-1]))
        return Buckets(flat, offsets, np.array([len(words) for words in tokens], dtype=np.int64))

    def counts(self, text: str) -> Int[np.ndarray, " num_buckets"]:
        """Count vector z(x) of one text, as the official `get_ngram_counts` returns it."""
        return self([text]).counts(self.num_buckets)


def ngram_keys(texts: pa.Array | Sequence[str], ngrams: int = 1) -> Int[np.ndarray, " total"]:
    """64-bit fingerprints of all n-grams of the texts: to ask whether two corpora share any at all."""
    return _hash(texts, ngrams, 1, "keys").ids


def tokenize(text: str) -> list[str]:
    """Lower-case a text and split it into words and runs of punctuation."""
    return _TOKEN.findall(text.lower())


def ngram_strings(tokens: Sequence[str], ngrams: int) -> Iterable[str]:
    """All 1..n-grams of a token list, each joined by one space: unigrams first, as the official code orders them."""
    for size in range(1, ngrams + 1):
        for start in range(len(tokens) - size + 1):
            yield " ".join(tokens[start : start + size])


def bucket(ngram: str, num_buckets: int = 10_000) -> int:
    """Bucket of one n-gram: ``int(sha256(utf-8), 16) mod B``.

    >>> bucket("alice"), bucket("alice went")
    (6720, 114)
    """
    return int(hashlib.sha256(ngram.encode("utf-8")).hexdigest(), 16) % num_buckets


def reference_buckets(tokens: Sequence[str], ngrams: int, num_buckets: int) -> list[int]:
    """The buckets of a token list in plain Python: the readable twin of the compiled kernel."""
    return [bucket(gram, num_buckets) for gram in ngram_strings(tokens, ngrams)]


# --- the compiled kernel ------------------------------------------------------------------------------------


@functools.cache
def _characters() -> UInt32[np.ndarray, " 1114112"]:
    """For every code point: ``lower-case code point * 4 + class of that``; from Python's own lower() and re."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]  # surrogates are no characters
    text = "".join(map(chr, points)).replace("İ", "i")  # U+0130 lowers to two characters: see _hash
    lowered = text.lower()
    spaces = re.sub(r"\s", "\0", re.sub(r"[^\s]", "\1", lowered))
    words = re.sub(r"\w", "\0", re.sub(r"[^\w]", "\1", lowered))
    is_space = np.frombuffer(spaces.encode(), np.uint8) == 0
    is_word = np.frombuffer(words.encode(), np.uint8) == 0
    kind = np.where(is_space, _SPACE, np.where(is_word, _WORD, _OTHER)).astype(np.uint32)
    table = np.zeros(0x110000, dtype=np.uint32)
    table[points] = np.frombuffer(lowered.encode("utf-32-le"), np.uint32) * 4 + kind
    return table


def _hash(texts: pa.Array | Sequence[str], ngrams: int, num_buckets: int, mode: str) -> Buckets:
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    if array.null_count:
        raise InputError(f"{array.null_count} of {len(array)} texts are null")
    if not (pa.types.is_large_string(array.type) or pa.types.is_string(array.type)):
        raise InputError(f"texts must be strings, not {array.type}")
    array = array.cast(pa.large_string())
    count = len(array)
    if count == 0:
        return Buckets(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int64))
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + count + 1]
    data_buffer = array.buffers()[2]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    widest = int(np.max(offsets[1:] - offsets[:-1]))
    room = int(ngrams * (offsets[-1] - offsets[0]))  # no text has more tokens than bytes; untouched pages cost nothing
    ids = np.empty(room, np.int64 if mode == "keys" else np.int32)
    id_offsets, tokens = np.zeros(count + 1, np.int64), np.empty(count, np.int64)
    memo_keys, memo_buckets = _memo(num_buckets)
    _hash_ngrams(
        data, offsets, _characters(), ngrams, num_buckets, _MODES[mode], memo_keys, memo_buckets,
        np.empty(2 * widest + 2, np.uint8), ids, id_offsets, tokens,
    )  # fmt: skip
    if tokens.min() < 0:  # Σ lowers by its context and İ to two characters: leave these documents to Python
        lowered = [text.lower() if split < 0 else text for text, split in zip(array.to_pylist(), tokens.tolist())]
        return _hash(lowered, ngrams, num_buckets, mode)
    return Buckets(ids[: id_offsets[-1]], id_offsets, tokens)


_memos = threading.local()


def _memo(num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """This thread's table of n-grams already hashed: fingerprint and bucket, direct-mapped, 12 MB."""
    if getattr(_memos, "num_buckets", None) != num_buckets:
        _memos.num_buckets = num_buckets
        _memos.tables = np.zeros(1 << _MEMO_BITS, np.uint64), np.zeros(1 << _MEMO_BITS, np.int32)
    return _memos.tables


_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@numba.njit(nogil=True, cache=True)
def _mix(x):
    """Finaliser of MurmurHash3 (64 bits): every input bit reaches every output bit."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@numba.njit(nogil=True, cache=True)
def _tokens(data, here, stop, characters, low, keys, ends):
    """Split and lower-case one document.

    Writes the tokens 1..count, each after a space, into `low`; token t is ``low[ends[t - 1] + 1 : ends[t]]``, and
    `keys[t]` its FNV-1a fingerprint. Where a token ends cannot be predicted, so nothing branches on it: slots are
    written again and again until the next token begins. Gives the count, or -1 where Σ or İ need `str.lower`.
    """
    count, end, current, key = 0, 0, np.uint32(_SPACE), np.uint64(0)
    ends[0] = 0
    while here < stop:
        byte = np.uint32(data[here])
        if byte < 0x80:
            entry, width = characters[byte], 1
        else:
            point, width = _decode(data, here)
            if point in (_SIGMA, _DOTTED_I):
                return -1
            entry = characters[point]
        here += width
        kind, lower = entry & np.uint32(3), entry >> np.uint32(2)
        text = kind != _SPACE
        begins = text & (kind != current)
        current = kind
        low[end] = 32
        end += begins
        count += begins
        key = _FNV_START if begins else key
        if lower < 0x80:
            low[end] = lower
            end += text
            key = (key ^ np.uint64(lower)) * _FNV_PRIME if text else key
        elif text:
            first, end = end, _encode(low, end, lower)
            for at in range(first, end):
                key = (key ^ np.uint64(low[at])) * _FNV_PRIME
        keys[count] = key
        ends[count] = end
    return count


@numba.njit(nogil=True, cache=True)
def _decode(data, at):
    """Code point of the UTF-8 sequence of two to four bytes at `at`, and its length."""
    first, second = np.uint32(data[at]), np.uint32(data[at + 1] & 0x3F)
    if first < 0xE0:
        return (first & np.uint32(0x1F)) << np.uint32(6) | second, 2
    third = np.uint32(data[at + 2] & 0x3F)
    if first < 0xF0:
        return (first & np.uint32(0x0F)) << np.uint32(12) | second << np.uint32(6) | third, 3
    fourth = np.uint32(data[at + 3] & 0x3F)
    return (first & np.uint32(7)) << np.uint32(18) | second << np.uint32(12) | third << np.uint32(6) | fourth, 4


@numba.njit(nogil=True, cache=True)
def _encode(low, at, point):
    """Write a code point of 0x80 or more as UTF-8; gives the position behind it."""
    if point < 0x800:
        low[at] = 0xC0 | point >> np.uint32(6)
    else:
        if point < 0x10000:
            low[at] = 0xE0 | point >> np.uint32(12)
        else:
            low[at] = 0xF0 | point >> np.uint32(18)
            at += 1
            low[at] = 0x80 | (point >> np.uint32(12) & np.uint32(0x3F))
        at += 1
        low[at] = 0x80 | (point >> np.uint32(6) & np.uint32(0x3F))
    low[at + 1] = 0x80 | (point & np.uint32(0x3F))
    return at + 2


@numba.njit(nogil=True, cache=True)
def _hash_ngrams(
    data, offsets, characters, ngrams, num_buckets, mode, memo_keys, memo_buckets, low, ids, id_offsets, tokens
):
    """Hash the n-grams of every document; see the module's equation.

    `grams[j]` is the fingerprint of the (j + 1)-gram that ends at the current token.
    """
    grams, schedule = np.zeros(ngrams, np.uint64), np.empty(64, np.uint32)
    keys, ends = np.empty(len(low) + 1, np.uint64), np.empty(len(low) + 1, np.int64)
    memo_shift, written = np.uint64(64 - _MEMO_BITS), 0
    for document in range(len(tokens)):
        count = _tokens(data, offsets[document], offsets[document + 1], characters, low, keys, ends)
        for token in range(1, count + 1):
            key = _mix(keys[token])
            for size in range(ngrams - 1, 0, -1):
                grams[size] = _mix(grams[size - 1] * np.uint64(0x9E3779B97F4A7C15) + key)
            grams[0] = key
            for size in range(min(ngrams, token)):
                gram = grams[size]
                if mode == 1:
                    ids[written] = ((gram >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32)
                elif mode == 2:
                    ids[written] = np.int64(gram)
                else:
                    slot = gram >> memo_shift
                    if memo_keys[slot] != gram:
                        start = ends[token - size - 1] + 1
                        memo_buckets[slot] = _sha256_mod(low, start, ends[token], num_buckets, schedule)
                        memo_keys[slot] = gram
                    ids[written] = memo_buckets[slot]
                written += 1
        id_offsets[document + 1] = written
        tokens[document] = count


def _sha256_constants() -> tuple[np.ndarray, np.ndarray]:
    """Fractional bits of the square and cube roots of the first primes (FIPS 180-4, sections 4.2.2 and 5.3.3)."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, int(n**0.5) + 1))]
    isqrt_bits = [math.isqrt(p << 64) & 0xFFFFFFFF for p in primes[:8]]
    return np.array(isqrt_bits, np.uint32), np.array([_cube_root(p << 96) & 0xFFFFFFFF for p in primes], np.uint32)


def _cube_root(number: int) -> int:
    low, high = 0, 1 << (number.bit_length() // 3 + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= number else (low, middle - 1)
    return low


_SHA_START, _SHA_ROUND = _sha256_constants()


@numba.njit(nogil=True, cache=True, inline="always")
def _rotate(x, bits):
    return np.uint32(x >> np.uint32(bits)) | np.uint32(x << np.uint32(32 - bits))


@numba.njit(nogil=True, cache=True)
def _sha256_mod(message, start, stop, modulus, schedule):
    """SHA-256 of ``message[start:stop]`` as a 256-bit integer, modulo `modulus` (FIPS 180-4)."""
    length = stop - start
    blocks = (length + 9 + 63) // 64
    state = _SHA_START.copy()
    for block in range(blocks):
        for word in range(16):
            value = np.uint32(0)
            for byte in range(4):
                at = block * 64 + word * 4 + byte
                octet = np.uint32(0)
                if at < length:
                    octet = np.uint32(message[start + at])
                elif at == length:
                    octet = np.uint32(0x80)
                value = np.uint32(value << np.uint32(8)) | octet
            schedule[word] = value
        if block == blocks - 1:
            schedule[14] = np.uint32((length * 8) >> 32)
            schedule[15] = np.uint32(length * 8)
        for t in range(16, 64):
            x, y = schedule[t - 15], schedule[t - 2]
            small0 = _rotate(x, 7) ^ _rotate(x, 18) ^ (x >> np.uint32(3))
            small1 = _rotate(y, 17) ^ _rotate(y, 19) ^ (y >> np.uint32(10))
            schedule[t] = np.uint32(schedule[t - 16] + small0 + schedule[t - 7] + small1)
        a, b, c, d, e, f, g, h = (
            state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
        )  # fmt: skip
        for t in range(64):
            big1 = _rotate(e, 6) ^ _rotate(e, 11) ^ _rotate(e, 25)
            choose = (e & f) ^ (~e & g)
            one = np.uint32(h + big1 + choose + _SHA_ROUND[t] + schedule[t])
            big0 = _rotate(a, 2) ^ _rotate(a, 13) ^ _rotate(a, 22)
            majority = (a & b) ^ (a & c) ^ (b & c)
            h, g, f, e = g, f, e, np.uint32(d + one)
            d, c, b, a = c, b, a, np.uint32(one + np.uint32(big0 + majority))
        state[0] += a
        state[1] += b
        state[2] += c
        state[3] += d
        state[4] += e
        state[5] += f
        state[6] += g
        state[7] += h
    remainder = np.uint64(0)
    for word in range(8):
        remainder = (remainder << np.uint64(32) | np.uint64(state[word])) % np.uint64(modulus)
    return np.int32(remainder)


@numba.njit(nogil=True, cache=True)
def _segment_sums(ids, offsets, table):
    sums = np.zeros((len(offsets) - 1, len(table)))
    for document in range(len(sums)):
        for column in range(len(table)):
            total = 0.0
            for position in range(offsets[document], offsets[document + 1]):
                total += table[column, ids[position]]
            sums[document, column] = total
    return sums
