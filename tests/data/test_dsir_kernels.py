"""The compiled kernels of the n-gram features at the seams of their tricks: words, blocks, runs, threads."""

import hashlib
import re
import threading

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.data import HashedNgrams
from salience.data.dsir import features, sha256
from salience.data.dsir.features import bucket, ngram_keys, ngram_strings, reference_buckets, tokenize
from salience.data.dsir.tokens import characters
from salience.data.dsir.weights import add_counts

# Runs of ASCII long and short, tokens of one byte to many, blocks of 64 with more than sixteen tokens.
PIECES = ["a", "Zz", "_9", ".", "!?", " ", "\n", "\x1f", "\0", "É", "ж", "中", "𝔘", "İ", "Σ", "K", "a.b,c;d", "x" * 8]
MIXED = st.lists(st.sampled_from([*PIECES, "X" * 9, "y" * 16, "y" * 17, "Q" * 64]), max_size=60).map("".join)


def test_classes_are_those_of_regular_expressions():
    points = np.array([*range(0x130), *range(0x131, 0xD800), *range(0xE000, 0x110000)])  # İ is left to str.lower
    table = characters()[points]
    lowered = "".join(map(chr, points)).lower()
    assert (table >> 2).astype("<u4").tobytes() == lowered.encode("utf-32-le")
    for kind, pattern in ((0, r"\s"), (1, r"\w"), (2, r"[^\w\s]")):
        found = [match.start() for match in re.finditer(pattern, lowered)]
        np.testing.assert_array_equal(np.flatnonzero(table & 3 == kind), found)


@given(st.lists(MIXED, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_tokens_and_buckets_of_mixed_runs(texts):
    found = HashedNgrams(2, 60_000)(texts)
    assert found.tokens.tolist() == [len(tokenize(text)) for text in texts]
    for i, text in enumerate(texts):  # even in order: single tokens, then pairs
        assert found.ids[found.offsets[i] : found.offsets[i + 1]].tolist() == reference_buckets(
            tokenize(text), 2, 60_000
        )


@given(st.lists(MIXED, min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_fingerprints_are_equal_where_ngrams_are(texts, ngrams):
    strings = [gram for text in texts for gram in ngram_strings(tokenize(text), ngrams)]
    keys = ngram_keys(texts, ngrams).tolist()
    assert len(keys) == len(strings)
    pairs = set(zip(keys, strings))
    # "a b" of two tokens and the token that would be written so differ, and no token holds a space.
    assert len(pairs) == len(set(keys)) == len(set(strings))


@pytest.mark.parametrize("num_buckets", [1, 1000, 1 << 16, (1 << 31) - 1])
def test_fast_buckets_are_scaled_fingerprints(num_buckets):
    texts = ["the cat sat on the mat", "Σ", "", "wholly different words, and more of them"]
    keys = ngram_keys(texts, 3) >> np.uint64(32)
    found = HashedNgrams(3, num_buckets, "fast")(texts)
    assert found.ids.tolist() == [int(key) * num_buckets >> 32 for key in keys]


def test_fast_buckets_are_spread_evenly():
    words = [f"w{number}" for number in range(20_000)]
    counts = HashedNgrams(2, 100, "fast")([*words, " ".join(words)]).counts(100)
    expected = counts.sum() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 3 * 200  # words are met twice, which doubles chi-square


def test_documents_left_to_python_stand_in_their_places():
    texts = ["one two", "ΑΣ Σ", "", "three", "İ", "four five six"]
    for hash in ("sha256", "fast"):
        hashed = HashedNgrams(2, 997, hash)
        whole = hashed(texts)
        for i, text in enumerate(texts):
            assert whole.ids[whole.offsets[i] : whole.offsets[i + 1]].tolist() == hashed([text]).ids.tolist()
        assert whole.tokens.tolist() == [len(tokenize(text)) for text in texts]


@pytest.mark.parametrize(
    ("num_buckets", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32), (1 << 21, np.int32)]
)
def test_size_of_bucket_numbers(num_buckets, kind):
    for hashed in (HashedNgrams(2, num_buckets), HashedNgrams(2, num_buckets, tokenizer=tokenize)):
        found = hashed(["a word and a word"])
        assert found.ids.dtype == kind
        assert found.ids.tolist() == reference_buckets(["a", "word", "and", "a", "word"], 2, num_buckets)


def test_buffers_are_used_again_by_documents_of_any_length():
    texts = ["long words " * 5000, "a", "ж" * 3000, "", "b c", "long words " * 9000]
    for text in texts:
        assert HashedNgrams(2, 997)([text]).ids.tolist() == reference_buckets(tokenize(text), 2, 997)


def test_threads_share_the_memo(monkeypatch):
    memo = np.zeros(16, np.uint64)  # so small that every entry is written again and again
    monkeypatch.setattr(features, "_memo", lambda num_buckets: memo)
    texts = [" ".join(f"w{number}" for number in range(start, start + 400)) for start in range(0, 4000, 400)]
    expected = [id for text in texts for id in reference_buckets(tokenize(text), 2, 16)]
    wrong = []

    def work():
        wrong.extend(None for _ in range(50) if HashedNgrams(2, 16)(texts).ids.tolist() != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memo.all() and not wrong


@numba.njit
def _with_instructions(state, message):
    sha256.compress_x86(state, message, 0)


@pytest.mark.parametrize(
    "compress",
    [
        pytest.param(lambda state, message: sha256.compress_portable(state, message, 0), id="portable"),
        pytest.param(
            _with_instructions,
            id="instructions",
            marks=pytest.mark.skipif(not sha256.has_sha_instructions(), reason="no SHA instructions here"),
        ),
    ],
)
def test_compression_of_a_block(compress):
    generator = np.random.default_rng(0)
    start = np.frombuffer(bytes.fromhex("6a09e667bb67ae853c6ef372a54ff53a510e527f9b05688c1f83d9ab5be0cd19"), ">u4")
    for length in (0, 1, 31, 55):
        message = np.zeros(64, np.uint8)
        message[:length] = generator.integers(0, 256, length)
        digest = hashlib.sha256(message[:length].tobytes()).hexdigest()
        message[length], message[62], message[63] = 0x80, length * 8 >> 8, length * 8 & 0xFF
        state = start.astype(np.uint32)
        compress(state, message)
        assert state.astype(">u4").tobytes().hex() == digest


def test_modulus_of_a_digest():
    for modulus in (1, 7, 10_000, (1 << 31) - 1):
        message = np.zeros(200, np.uint8)
        message[:100] = 97
        assert sha256.sha256_mod(message, 100, modulus) == bucket("a" * 100, modulus)


def test_counts_are_added_in_place():
    counts = np.full(997, 5, np.int64)
    found = HashedNgrams(2, 997)(["a b a", "c"])
    add_counts(counts, found, None)
    np.testing.assert_array_equal(counts - 5, np.bincount(found.ids, minlength=997))
