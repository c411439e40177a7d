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
_MEMO_BITS = 20
_MODES = {"sha256": 0, "fast": 1, "keys": 2}


class Buckets(NamedTuple):
    """The n-grams of a batch of documents, as bucket numbers in reading order.

    Attributes
    ----------
    ids : (total,) int32
        Bucket of every n-gram; document i owns ``ids[offsets[i]:offsets[i + 1]]``.
    offsets : (documents + 1,) int64
    tokens : (documents,) int64
        Number of tokens of each document.
    """

    ids: Int[np.ndarray, " total"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    tokens: Int[np.ndarray, " documents"]

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
    text = "".join(map(chr, points)).replace("İ", "i")  # U+0130 lowers to two characters: see _lowered
    lowered = text.lower()
    spaces = re.sub(r"\s", "\0", re.sub(r"[^\s]", "\1", lowered))
    words = re.sub(r"\w", "\0", re.sub(r"[^\w]", "\1", lowered))
    is_space = np.frombuffer(spaces.encode(), np.uint8) == 0
    is_word = np.frombuffer(words.encode(), np.uint8) == 0
    kind = np.where(is_space, _SPACE, np.where(is_word, _WORD, _OTHER)).astype(np.uint32)
    table = np.zeros(0x110000, dtype=np.uint32)
    table[points] = np.frombuffer(lowered.encode("utf-32-le"), np.uint32) * 4 + kind
    return table


def _lowered(texts: pa.Array) -> pa.Array:
    """Lower in Python the documents with Σ (final sigma depends on context) or İ (becomes two characters)."""
    buffer = texts.buffers()[2]
    if buffer is None or re.search(b"\xce\xa3|\xc4\xb0", memoryview(buffer)) is None:
        return texts
    return pa.array(
        [text.lower() if "Σ" in text or "İ" in text else text for text in texts.to_pylist()], texts.type
    )


def _hash(texts: pa.Array | Sequence[str], ngrams: int, num_buckets: int, mode: str) -> Buckets:
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    if array.null_count:
        raise InputError(f"{array.null_count} of {len(array)} texts are null")
    if not (pa.types.is_large_string(array.type) or pa.types.is_string(array.type)):
        raise InputError(f"texts must be strings, not {array.type}")
    array = _lowered(array.cast(pa.large_string()))
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
    return Buckets(ids[: id_offsets[-1]], id_offsets, tokens)


_memos = threading.local()


def _memo(num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """This thread's table of n-grams already hashed: fingerprint and bucket, direct-mapped, 12 MB."""
    if getattr(_memos, "num_buckets", None) != num_buckets:
        _memos.num_buckets = num_buckets
        _memos.tables = np.zeros(1 << _MEMO_BITS, np.uint64), np.zeros(1 << _MEMO_BITS, np.int32)
    return _memos.tables


@numba.njit(nogil=True, cache=True)
def _mix(x):
    """Finaliser of MurmurHash3 (64 bits): every input bit reaches every output bit."""
    x = np.uint64(x)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@numba.njit(nogil=True, cache=True)
def _hash_ngrams(
    data, offsets, characters, ngrams, num_buckets, mode, memo_keys, memo_buckets, low, ids, id_offsets, tokens
):
    """Tokenise, lower-case and hash every document; see the module's equation.

    `low` receives the lower-cased tokens of a document joined by single spaces, so that every n-gram is one slice of
    it. `keys[j]` is the fingerprint, and `starts[j]` the first byte, of the (j + 1)-gram that ends at this token.
    """
    keys, starts = np.zeros(ngrams, np.uint64), np.zeros(ngrams, np.int64)
    schedule = np.empty(64, np.uint32)
    ascii_characters = characters[:128].copy()
    memo_shift = np.uint64(64 - _MEMO_BITS)
    written = 0
    for document in range(len(tokens)):
        here, stop = offsets[document], offsets[document + 1]
        end = 0
        count = 0
        current = _SPACE
        key = np.uint64(0)
        while here <= stop:
            point, width = np.uint32(32), 1  # a space after the last character closes the last token
            if here < stop:
                first = np.uint32(data[here])
                if first < 0x80:
                    point = first
                elif first < 0xE0:
                    point = (first & np.uint32(0x1F)) << np.uint32(6) | (data[here + 1] & np.uint32(0x3F))
                    width = 2
                elif first < 0xF0:
                    point = (
                        (first & np.uint32(0x0F)) << np.uint32(12)
                        | (data[here + 1] & np.uint32(0x3F)) << np.uint32(6)
                        | (data[here + 2] & np.uint32(0x3F))
                    )
                    width = 3
                else:
                    point = (
                        (first & np.uint32(0x07)) << np.uint32(18)
                        | (data[here + 1] & np.uint32(0x3F)) << np.uint32(12)
                        | (data[here + 2] & np.uint32(0x3F)) << np.uint32(6)
                        | (data[here + 3] & np.uint32(0x3F))
                    )
                    width = 4
            here += width
            entry = characters[point]
            kind = entry & np.uint32(3)
            if kind != current:
                if current != _SPACE:  # a token ends here
                    key = _mix(key)
                    for size in range(ngrams - 1, 0, -1):
                        keys[size] = _mix(keys[size - 1] * np.uint64(0x9E3779B97F4A7C15) + key)
                    keys[0] = key
                    count += 1
                    for size in range(min(ngrams, count)):
                        if mode == 1:
                            ids[written] = ((keys[size] >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32)
                        elif mode == 2:
                            ids[written] = np.int64(keys[size])
                        else:
                            slot = keys[size] >> memo_shift
                            if memo_keys[slot] != keys[size]:
                                memo_buckets[slot] = _sha256_mod(low, starts[size], end, num_buckets, schedule)
                                memo_keys[slot] = keys[size]
                            ids[written] = memo_buckets[slot]
                        written += 1
                if kind != _SPACE:  # a token begins here
                    if count > 0:
                        low[end] = 32
                        end += 1
                    for size in range(ngrams - 1, 0, -1):
                        starts[size] = starts[size - 1]
                    starts[0] = end
                    key = np.uint64(0xCBF29CE484222325)
                current = kind
            if kind == _SPACE:
                continue
            lower = entry >> np.uint32(2)  # append the lower-case character, FNV-1a over its bytes
            begin = end
            if lower < 0x80:
                low[end] = lower
                end += 1
            elif lower < 0x800:
                low[end] = 0xC0 | lower >> np.uint32(6)
                low[end + 1] = 0x80 | (lower & 0x3F)
                end += 2
            elif lower < 0x10000:
                low[end] = 0xE0 | lower >> np.uint32(12)
                low[end + 1] = 0x80 | (lower >> np.uint32(6) & 0x3F)
                low[end + 2] = 0x80 | (lower & 0x3F)
                end += 3
            else:
                low[end] = 0xF0 | lower >> np.uint32(18)
                low[end + 1] = 0x80 | (lower >> np.uint32(12) & 0x3F)
                low[end + 2] = 0x80 | (lower >> np.uint32(6) & 0x3F)
                low[end + 3] = 0x80 | (lower & 0x3F)
                end += 4
            for at in range(begin, end):
                key = (key ^ np.uint64(low[at])) * np.uint64(0x100000001B3)
            while here < stop and data[here] < 0x80:  # the rest of an ASCII token, without decoding
                entry = ascii_characters[data[here]]
                if entry & np.uint32(3) != current:
                    break
                low[end] = entry >> np.uint32(2)
                key = (key ^ np.uint64(entry >> np.uint32(2))) * np.uint64(0x100000001B3)
                end += 1
                here += 1
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
