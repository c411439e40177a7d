"""The byte n-gram model against its formula in plain Python, and hand-worked numbers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.errors import InputError
from salience.measure import language
from salience.measure.language import ByteNgram

TEXTS = st.lists(st.binary(max_size=12) | st.text("ab", max_size=12).map(str.encode), min_size=1, max_size=5)


def reference(training: list[bytes], order: int, context: bytes, byte: int) -> float:
    """Interpolated Witten-Bell as the module's docstring states it, from shorter to longer contexts."""
    following: dict[bytes, Counter] = {}
    for text in training:
        for at, value in enumerate(text):
            for length in range(min(order - 1, at) + 1):
                following.setdefault(text[at - length : at], Counter())[value] += 1
    probability = 1 / 256
    for length in range(min(order - 1, len(context)) + 1):
        seen = following.get(context[len(context) - length :])
        if seen is None:
            break
        probability = (seen[byte] + len(seen) * probability) / (seen.total() + len(seen))
    return probability


def test_hand_worked() -> None:
    """Trained on "aab": a and b follow the empty context 2 and 1 times; after a, each once."""
    model = ByteNgram(order=2).fit([b"aab"])
    a = (2 + 2 / 256) / (3 + 2)
    b_after_a = (1 + 2 * (1 + 2 / 256) / (3 + 2)) / (2 + 2)
    c_after_b = (0 + 2 / 256) / (3 + 2)  # nothing has followed b: the shorter context decides
    np.testing.assert_allclose(model.bits([b"abc"]), [-math.log2(a * b_after_a * c_after_b)])
    np.testing.assert_allclose(model.bits([b"a", b"", b"a"]), [-math.log2(a), 0, -math.log2(a)])


@settings(max_examples=60)
@given(TEXTS, TEXTS, st.integers(1, 7))
def test_bits_are_those_of_the_formula(training: list[bytes], texts: list[bytes], order: int) -> None:
    if not b"".join(training):
        with pytest.raises(InputError, match="no text to fit on"):
            ByteNgram(order).fit(training)
        return
    bits = ByteNgram(order).fit(training).bits(texts)
    expected = [
        -sum(math.log2(reference(training, order, text[:at], text[at])) for at in range(len(text))) for text in texts
    ]
    np.testing.assert_allclose(bits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5, 7])
@pytest.mark.parametrize("context", [b"", b"ab", b"abracadabra", b"\x00\xff\x00", b"unseen!"])
def test_probabilities_of_all_bytes_sum_to_one(order: int, context: bytes) -> None:
    model = ByteNgram(order).fit([b"abracadabra", b"\x00\x00\xff\x00", b"banana"])
    all_bits = model.bits([context + bytes([byte]) for byte in range(256)])
    assert (2.0 ** -(all_bits - model.bits([context])[0])).sum() == pytest.approx(1, abs=1e-12)


def test_contexts_do_not_cross_texts() -> None:
    apart, joined = ByteNgram(3).fit([b"ab", b"ab"]), ByteNgram(3).fit([b"abab"])
    assert apart.bits([b"ba"]) != joined.bits([b"ba"])
    assert apart.bits([b"ab", b"ba"]).sum() == pytest.approx(apart.bits([b"ab"])[0] + apart.bits([b"ba"])[0])


def test_growing_the_table_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    training = [generator.bytes(300), bytes(generator.integers(97, 100, 500, dtype=np.uint8)), b"", b"x"]
    texts = [generator.bytes(50), b"abcabcbacba"]
    expected = ByteNgram(5).fit(training).bits(texts)
    monkeypatch.setattr(language, "_SLOTS", 64)
    model = ByteNgram(5).fit(training)
    assert len(model._keys) > 64 * 4  # grown more than once, by the seven hundred n-grams and more
    np.testing.assert_array_equal(model.bits(texts), expected)


def test_training_text_is_cheaper_than_other_text() -> None:
    text = b"the cat sat on the mat. " * 20
    model = ByteNgram().fit([text])
    bits = model.bits([text[:48], b"an unrelated line, to be sure, of 48 characters"])
    assert bits[0] < 48 < bits[1]


@pytest.mark.parametrize("order", [0, 8, -1])
def test_orders_out_of_range(order: int) -> None:
    with pytest.raises(InputError, match=f"order must lie in 1..7, not {order}"):
        ByteNgram(order)


def test_no_text_to_fit_on() -> None:
    for texts in ([], [b""], [b"", b""]):
        with pytest.raises(InputError, match="no text to fit on"):
            ByteNgram().fit(texts)
    assert ByteNgram().fit([b"a"]).bits([]).shape == (0,)
