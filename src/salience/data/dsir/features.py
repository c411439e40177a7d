r"""Hashed n-gram features: the bag of buckets that DSIR weighs text by.

A document is lower-cased, split by ``\w+|[^\w\s]+`` (NLTK's WordPunctTokenizer), and every run of 1..n tokens,
joined by one space, falls into the bucket

    bucket(s) = int(sha256(utf-8(s)), 16) mod B            (exact; `hash="sha256"`)
    bucket(s) = floor(fingerprint(s) / 2^64 * B)           (`hash="fast"`, explicit only)

`z(x) in N^B` counts them. Compiled kernels (`tokens`, `kernels`, `sha256`) read Arrow's UTF-8 buffers;
`reference_buckets` is their readable twin.

Source: Xie, Santurkar, Ma, Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023,
section 4; bucket numbers as in the official package `data-selection` 1.0.3.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt64

from salience.data.dsir import kernels, tokens
from salience.errors import InputError

_TOKEN = re.compile(r"\w+|[^\w\s]+", re.UNICODE | re.MULTILINE | re.DOTALL)


class Buckets(NamedTuple):
    """The n-grams of a batch of documents, as bucket numbers.

    Attributes
    ----------
    ids : (total,) uint16, or int32 where bucket numbers need it
        Bucket of every n-gram; document i owns ``ids[offsets[i]:offsets[i + 1]]``: first its single tokens in reading
        order, then its pairs, and so on.
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
        return self._replace(ids=self.ids.astype(_id_type(num_buckets), copy=False))

    def counts(self, num_buckets: int) -> Int[np.ndarray, " num_buckets"]:
        """Sum the batch's documents into one count vector (n-grams per bucket)."""
        counts = np.zeros(num_buckets, np.int64)
        kernels.count_ids(self.ids, counts)
        return counts

    def sums(self, table: Float[np.ndarray, "columns num_buckets"]) -> Float[np.ndarray, "documents columns"]:
        """Sum a value per bucket over the n-grams of each document: `table @ z(x)` for every x."""
        return kernels.segment_sums(self.ids, self.offsets, np.ascontiguousarray(table, dtype=np.float64))


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
        flat = np.fromiter(
            (bucket for row in ids for bucket in row), _id_type(self.num_buckets), count=int(offsets[-1])
        )
        return Buckets(flat, offsets, np.array([len(words) for words in tokens], dtype=np.int64))

    def counts(self, text: str) -> Int[np.ndarray, " num_buckets"]:
        """Count vector z(x) of one text, as the official `get_ngram_counts` returns it."""
        return self([text]).counts(self.num_buckets)


def ngram_keys(texts: pa.Array | Sequence[str], ngrams: int = 1) -> UInt64[np.ndarray, " total"]:
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


# --- the compiled kernels -----------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Arrays of this thread that are used again for every batch: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int, dtype: type[np.generic]) -> np.ndarray:
        """An array of at least this size, that holds anything."""
        held = self._arrays.get(name)
        if held is None or len(held) < size or held.dtype != dtype:
            held = self._arrays[name] = np.zeros(size, dtype)
        return held


_scratch = _Scratch()


@functools.lru_cache(maxsize=2)
def _memo(num_buckets: int) -> UInt64[np.ndarray, " entries"]:
    """Buckets of n-grams hashed before, for all threads: 8 MB (see `kernels.exact_buckets`)."""
    return np.zeros(1 << 20, np.uint64)


def _id_type(num_buckets: int) -> type[np.generic]:
    return np.uint16 if num_buckets <= 1 << 16 else np.int32


def _hash(texts: pa.Array | Sequence[str], ngrams: int, num_buckets: int, mode: str) -> Buckets:
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    if array.null_count:
        raise InputError(f"{array.null_count} of {len(array)} texts are null")
    if not (pa.types.is_large_string(array.type) or pa.types.is_string(array.type)):
        raise InputError(f"texts must be strings, not {array.type}")
    array = array.cast(pa.large_string())
    count = len(array)
    if count == 0:
        return Buckets(np.empty(0, _id_type(num_buckets)), np.zeros(1, np.int64), np.empty(0, np.int64))
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + count + 1]
    data_buffer = array.buffers()[2]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    # No document has more tokens than bytes; lower-casing makes at most three bytes of two.
    widest = int(np.max(offsets[1:] - offsets[:-1])) + tokens.PADDING
    take = _scratch.take
    low, kind = take("low", 2 * widest, np.uint8), take("kind", 2 * widest, np.uint8)
    starts, stops = take("starts", widest, np.int64), take("stops", widest, np.int64)
    keys, grams = take("keys", widest, np.uint64), take("grams", widest, np.uint64)
    room = int(ngrams * (offsets[-1] - offsets[0]))
    ids = take("fingerprints", room, np.uint64) if mode == "keys" else take("ids", room, _id_type(num_buckets))
    id_offsets, lengths = np.zeros(count + 1, np.int64), np.empty(count, np.int64)
    given = data, offsets, tokens.characters(), ngrams
    filled = low, kind, starts, stops, keys, grams, ids, id_offsets, lengths
    if mode == "keys":
        kernels.fingerprints(*given, *filled)
    elif mode == "fast":
        kernels.fast_buckets(*given, num_buckets, *filled)
    else:
        message = take("message", 4 * widest, np.uint8)
        kernels.exact_buckets(*given, num_buckets, *filled, _memo(num_buckets), message)
    buckets = Buckets(ids[: id_offsets[-1]].copy(), id_offsets, lengths)
    left = np.flatnonzero(lengths < 0)
    if not len(left):
        return buckets
    lowered = [text.lower() for text in array.take(pa.array(left)).to_pylist()]
    return _insert(buckets, left, _hash(lowered, ngrams, num_buckets, mode))


def _insert(buckets: Buckets, where: Int[np.ndarray, " late"], late: Buckets) -> Buckets:
    """Put the n-grams of documents that the kernels left out into their places."""
    sizes, all_sizes, lengths = np.diff(late.offsets), np.diff(buckets.offsets), buckets.tokens.copy()
    all_sizes[where], lengths[where] = sizes, late.tokens
    ids = np.insert(buckets.ids, np.repeat(buckets.offsets[where], sizes), late.ids)
    return Buckets(ids, np.concatenate([[0], np.cumsum(all_sizes)]), lengths)
