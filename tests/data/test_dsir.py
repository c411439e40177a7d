"""DSIR: the kernel against its plain Python twin, and everything against figures of the official package."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from salience.data import DSIR, HashedNgrams, kl_reduction
from salience.data.dsir.features import bucket, ngram_keys, ngram_strings, reference_buckets, tokenize
from salience.data.dsir.resample import TopK, quotas, take
from salience.data.dsir.weights import EPSILON, add_counts
from salience.errors import DataError, InputError

OFFICIAL = json.loads((Path(__file__).parent / "dsir_official.json").read_text(encoding="utf-8"))
CASES = [pytest.param(case, id=f"n{case['ngrams']}-B{case['buckets']}") for case in OFFICIAL["cases"]]
HARD = (
    "ΑΣ ΣΑΣ ΌΣΟΣ.Σ aΣ\u0345 Σ", "İstanbul DİYAR", "ǅ ß ẞ K Å Ⱥ Ⱦ ﬁ", "𝔘𝔫 𐐀 🙂🙂a🙂", "中文字 नमस्ते", "_a_b – “x”",
    "\x1c\x85\xa0\u2028a", "\x00 a\x00b", "", " ", "\n\t", "a", "١٢٣ ²³ ½",
)  # fmt: skip


def twin(text: str, ngrams: int, num_buckets: int) -> np.ndarray:
    return np.bincount(np.array(reference_buckets(tokenize(text), ngrams, num_buckets), int), minlength=num_buckets)


# --- features ---


def test_published_bucket_numbers():
    assert (bucket("alice"), bucket("alice went")) == (6720, 114)
    found = HashedNgrams()(["Alice went to the store"])
    assert (found.ids[0], found.ids[5]) == (6720, 114)  # single words first, then pairs
    assert (len(found.ids), found.tokens.tolist()) == (9, [5])  # five words and four pairs


def test_tokens_are_those_of_wordpunct():
    assert tokenize("Don't stop, x_1: 3.14!") == ["don", "'", "t", "stop", ",", "x_1", ":", "3", ".", "14", "!"]
    assert list(ngram_strings(["a", "b", "c"], 2)) == ["a", "b", "c", "a b", "b c"]


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("ngrams", [1, 2, 3])
def test_kernel_equals_twin_on_hard_text(text, ngrams):
    assert (HashedNgrams(ngrams, 997).counts(text) == twin(text, ngrams, 997)).all()


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4), st.integers(1, 4), st.sampled_from([1, 7, 10_000]))
@settings(max_examples=200, deadline=None)
def test_kernel_equals_twin(texts, ngrams, num_buckets):
    found = HashedNgrams(ngrams, num_buckets)(texts)
    assert found.tokens.tolist() == [len(tokenize(text)) for text in texts]
    for i, text in enumerate(texts):
        ids = found.ids[found.offsets[i] : found.offsets[i + 1]]
        assert sorted(ids.tolist()) == sorted(reference_buckets(tokenize(text), ngrams, num_buckets))


def test_kernel_equals_twin_on_every_character():
    points = [*range(0xD800), *range(0xE000, 0x32400), *range(0xE0000, 0xE0200)]
    for start in range(0, len(points), 2000):
        text = "a" + "a ".join(map(chr, points[start : start + 2000]))
        assert (HashedNgrams(1).counts(text) == twin(text, 1, 10_000)).all(), hex(points[start])


def test_long_ngrams_use_several_sha_blocks():
    for length in (54, 55, 56, 63, 64, 65, 119, 120, 500):
        text = "x" * length
        assert HashedNgrams()([text]).ids.tolist() == [bucket(text)]


def test_a_tokenizer_of_your_own():
    spaced = HashedNgrams(2, 997, tokenizer=str.split)(["A-b c", ""])
    assert spaced.ids.tolist() == [bucket("a-b", 997), bucket("c", 997), bucket("a-b c", 997)]
    assert spaced.tokens.tolist() == [2, 0]


def test_arrow_slices_and_string_kinds():
    texts = ["zero", "eins zwei", "Ünïcode ΑΣ", ""]
    whole = HashedNgrams()(texts)
    for kind in (pa.string(), pa.large_string()):
        part = HashedNgrams()(pa.array(texts, kind).slice(1, 2))
        assert part.ids.tolist() == whole.ids[whole.offsets[1] : whole.offsets[3]].tolist()


def test_sums_and_counts_agree():
    texts, table = OFFICIAL["raw"], np.random.default_rng(0).normal(size=(2, 997))
    found = HashedNgrams(2, 997)(texts)
    dense = np.stack([twin(text, 2, 997) for text in texts])
    np.testing.assert_allclose(found.sums(table), dense @ table.T, atol=1e-9)
    np.testing.assert_array_equal(found.counts(997), dense.sum(0))
    np.testing.assert_array_equal(found.compact(997).sums(table), found.sums(table))


def test_keys_tell_whether_texts_share_a_word():
    assert np.isin(ngram_keys(["one two"]), ngram_keys(["TWO three"])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngrams": 0}, "ngrams must be at least 1, not 0"),
        ({"num_buckets": 0}, "num_buckets must lie in"),
        ({"hash": "md5"}, "'sha256' or 'fast', not 'md5'"),
        ({"hash": "fast", "tokenizer": str.split}, "built-in tokenizer only"),
    ],
)
def test_bad_features(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        HashedNgrams(**options)


def test_null_texts_are_refused():
    with pytest.raises(InputError, match="1 of 2 texts are null"):
        HashedNgrams()(pa.array(["a", None]))


# --- weights: parity with data-selection 1.0.3 ---


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_official_package(case):
    raw, target = OFFICIAL["raw"], OFFICIAL["target"]
    features = HashedNgrams(case["ngrams"], case["buckets"])
    positions = np.arange(case["buckets"])
    assert [int(features.counts(text) @ positions) for text in raw] == case["count_sum_hash"]
    model = DSIR(ngrams=case["ngrams"], num_buckets=case["buckets"], min_tokens=20)
    model.fit(raw, target)
    np.testing.assert_allclose(model.log_weights(raw)[:, 0], case["log_weights"], rtol=0, atol=1e-9)
    assert model.select(raw, 10, top_k=True).tolist() == case["top_10"]
    tokens, ngrams = features(raw).tokens, case["ngrams"]
    long = tokens >= ngrams - 1  # below that the official length formula is off
    assert (tokens[long] == np.array(case["lengths"])[long]).all()


def test_weights_by_hand():
    model = DSIR(ngrams=1, num_buckets=10_000, min_tokens=0).fit(["a a b", "b c"], ["a b"])
    expected = np.log(0.5 + EPSILON) - np.log(2 / 5 + EPSILON)
    assert model.log_weights(["a"])[0, 0] == pytest.approx(expected, abs=1e-12)
    unseen_in_target = np.log(EPSILON) - np.log(1 / 5 + EPSILON)
    assert model.log_weights(["c c"])[0, 0] == pytest.approx(2 * unseen_in_target, abs=1e-9)  # a sum, not a mean


def test_smoothing_is_a_pseudo_count_per_bucket_of_the_target():
    model = DSIR(ngrams=1, num_buckets=10, min_tokens=0, smoothing=2.0).fit(["a b"], ["a"])
    expected = np.log(2 / (1 + 10 * 2) + EPSILON) - np.log(EPSILON)  # a bucket that neither corpus has
    unseen = next(i for i in range(10) if model.raw_counts_[i] == 0)
    assert model.log_diff_[0, unseen] == pytest.approx(expected, abs=1e-12)


def test_fast_hash_ranks_like_exact_hashes_rank_each_other():
    """Bar of the brief: agreement with the exact hash at least the median of five salted sha256, minus 0.01."""
    from salience.reproductions.worlds.text import pool

    world = pool(0, "numpy", [])
    raw, target = [item.text for item in world.raw[:2500]], [item.text for item in world.target]
    exact = DSIR(min_tokens=0).fit(raw, target).log_weights(raw)[:, 0]
    fast = DSIR(min_tokens=0, hash="fast").fit(raw, target).log_weights(raw)[:, 0]
    salted = []
    for salt in range(5):
        # A token in front of every token's text changes all buckets and nothing else.
        model = DSIR(min_tokens=0, tokenizer=lambda text, salt=salt: [f"{salt}{word}" for word in tokenize(text)])
        salted.append(spearmanr(exact, model.fit(raw, target).log_weights(raw)[:, 0]).statistic)
    assert spearmanr(exact, fast).statistic >= np.median(salted) - 0.01

    # The second half of the bar: what each hash chooses, measured in exact buckets, is equally close to the target.
    features, held_out = HashedNgrams(), [item.text for item in world.held_out]
    target_counts, raw_counts = features(held_out).counts(10_000), features(raw).counts(10_000)
    reductions = []
    for hash in ("sha256", "fast"):
        chosen = DSIR(min_tokens=0, hash=hash).fit(raw, target).select(raw, 250)
        counts = features([raw[i] for i in chosen]).counts(10_000)
        reductions.append(kl_reduction(target_counts, raw_counts, counts))
    assert reductions[1] == pytest.approx(reductions[0], rel=0.05)


def test_ngram_limit_stops_after_the_document_that_passes_it():
    features = HashedNgrams(1, 997)
    counts = np.zeros(997, np.int64)
    add_counts(counts, features(["a b", "c d", "e f"]), 3)
    assert counts.sum() == 4
    add_counts(counts, features(["g"]), 3)
    assert counts.sum() == 4
    assert DSIR(max_ngrams=5).fit(["a b c d e f g", "h"], ["a"]).raw_counts_.sum() == 13  # one unit, its first document


def test_separate_targets():
    raw = ["red rose"] * 10 + ["blue sea"] * 10 + ["green leaf"] * 10
    model = DSIR(min_tokens=0, separate_targets=True, target_proportions=[0.3, 0.7]).fit(raw, [["red"], ["blue"]])
    chosen = model.choose(raw, 10)
    assert sorted(chosen.target.tolist()) == [0] * 3 + [1] * 7
    assert len({*zip(chosen.units.tolist(), chosen.rows.tolist())}) == 10
    assert (chosen.rows[chosen.target == 0] < 10).all()
    assert ((chosen.rows[chosen.target == 1] >= 10) & (chosen.rows[chosen.target == 1] < 20)).all()
    by_size = DSIR(separate_targets=True).fit(raw, [["red rose"], ["blue"]])
    np.testing.assert_allclose(by_size.target_proportions_, [0.75, 0.25])  # three n-grams to one


def test_a_document_is_taken_for_one_target_only():
    first, second = TopK(3), TopK(3)
    for heap in (first, second):
        heap.offer(np.array([3.0, 2.0, 1.0]), np.array([3.0, 2.0, 1.0]), 0, np.array([5, 6, 7]))
    assert take([first, second], [1, 2]).target.tolist() == [0, 1, 1]
    assert take([first, second], [1, 2]).rows.tolist() == [5, 6, 7]


def test_quotas_give_the_remainder_to_the_last():
    assert quotas(10, [1, 1, 1]) == [3, 3, 4]
    with pytest.raises(InputError, match="not all zero"):
        quotas(3, [0, 0])


def test_topk_is_the_same_however_it_is_merged():
    rng = np.random.default_rng(0)
    keys, rows = rng.integers(0, 50, 60_000).astype(float), np.arange(60_000)  # many ties
    whole = TopK(1000)
    whole.offer(keys, keys, 0, rows)
    parts = [TopK(1000) for _ in range(4)]
    for number, part in enumerate(parts):
        part.offer(keys[number::4], keys[number::4], 0, rows[number::4])
    merged = TopK(1000)
    for part in reversed(parts):
        merged.merge(part)
    for one, other in zip(whole.best(), merged.best()):
        np.testing.assert_array_equal(one, other)


def test_short_documents_are_weighed_but_not_chosen():
    raw = ["alpha", "alpha beta gamma", "delta epsilon zeta"]
    model = DSIR(min_tokens=3).fit(raw, ["alpha"])
    assert model.raw_counts_.sum() == 1 + 5 + 5
    assert model.select(raw, 2).tolist() == [1, 2]
    with pytest.raises(InputError, match="count 3 is more than the 2 eligible documents"):
        model.select(raw, 3)


def test_noise_is_there_and_keyed():
    rng = np.random.default_rng(0)
    raw = [" ".join(rng.choice(list("abcdefgh"), 12)) for _ in range(300)]
    model = DSIR(ngrams=1, min_tokens=0).fit(raw, ["a b"])
    assert model.select(raw, 30).tolist() == model.select(raw, 30).tolist()
    assert model.select(raw, 30).tolist() != model.select(raw, 30, top_k=True).tolist()
    other = DSIR(ngrams=1, min_tokens=0, random_state=1).fit(raw, ["a b"])
    assert model.select(raw, 30).tolist() != other.select(raw, 30).tolist()


def test_save_and_load(tmp_path):
    raw, target = OFFICIAL["raw"], OFFICIAL["target"]
    model = DSIR(num_buckets=997, min_tokens=5, smoothing=0.5).fit(raw, target)
    model.save(tmp_path / "model.safetensors")
    again = DSIR.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.log_diff_, model.log_diff_)
    assert again.select(raw, 9).tolist() == model.select(raw, 9).tolist()
    (tmp_path / "bad").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(DataError, match="is not a saved DSIR"):
        DSIR.load(tmp_path / "bad")
    with pytest.raises(InputError, match="tokenizer of your own cannot be saved"):
        DSIR(tokenizer=str.split).fit(raw, target).save(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": -1.0}, "smoothing must be"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"max_bad": 2.0}, "max_bad must lie in 0..1"),
        ({"max_ngrams": "some"}, "max_ngrams must be"),
        ({"target_proportions": [1.0]}, "needs separate_targets"),
        ({"separate_targets": True, "target_proportions": [1.0, 2.0]}, "2 entries for 1 targets"),
    ],
)
def test_bad_parameters_are_named_in_fit(options, message):
    model = DSIR(**options)  # never in __init__
    with pytest.raises(InputError, match=re.escape(message)):
        model.fit(["a"], [["a"]] if model.separate_targets else ["a"])


def test_nothing_to_weigh():
    with pytest.raises(DataError, match="the target is empty"):
        DSIR().fit(["a b"], [" "])
    with pytest.raises(DataError, match="the raw corpus holds no n-gram"):
        DSIR().fit([" "], ["a"])


# --- KL reduction ---


def test_kl_reduction_by_hand():
    target, raw, selected = np.array([[3, 1]]), np.array([1, 1]), np.array([3, 1])
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert kl_reduction(target, raw, selected) == pytest.approx(expected, abs=1e-7)
    assert kl_reduction(target, raw, raw) == 0.0
    both = kl_reduction(np.array([[3, 1], [1, 3]]), raw, selected)
    assert both == pytest.approx((expected + 0.25 * np.log(1.5) + 0.75 * np.log(0.5)) / 2, abs=1e-7)
    with pytest.raises(InputError, match="selected holds no n-gram"):
        kl_reduction(target, raw, np.array([0, 0]))
