r"""Did the selection help? Measured on target documents that the selection never saw.

Two figures, each with the interval of the paired difference over held-out documents and draws of the baseline:

* KL reduction (`kl_reduction`). It is linear in the held-out distribution, so every held-out document has its share.
* Bits per byte that a small byte n-gram model, trained on equally many bytes of each selection, needs for the
  held-out documents.

Random is the mean of several random selections of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from jaxtyping import Float, Int

from salience.data.dsir.features import Buckets, HashedNgrams
from salience.data.dsir.weights import log_ratio
from salience.errors import InputError
from salience.measure import difference_over_draws
from salience.measure.language import ByteNgram

MODEL_BYTES = 2_000_000
HELD_OUT_BYTES = 1_000_000


class Texts:
    """A growing set of documents: some of their texts, and the n-gram counts of all of them."""

    def __init__(self, num_buckets: int = 1) -> None:
        self.counts = np.zeros(num_buckets, np.int64)
        self.where: list[tuple[str, int]] = []
        self._strings: list[str] = []

    def __len__(self) -> int:
        return len(self._strings)

    def add(self, texts: pa.Array, where: Sequence[tuple[str, int]] = ()) -> None:
        """Keep these texts (and where they stand)."""
        self._strings += texts.to_pylist()
        self.where += where

    def count(self, buckets: Buckets) -> None:
        """Add n-gram counts."""
        self.counts += buckets.counts(len(self.counts))

    def extend(self, other: Texts) -> None:
        """Take over another set of the same kind."""
        self.counts = self.counts + other.counts
        self._strings += other._strings
        self.where += other.where

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for a ledger."""
        return {"counts": self.counts, "where": self.where, "strings": self._strings}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Texts:
        """What `state` was taken of."""
        texts = cls()
        texts.counts, texts._strings = state["counts"], state["strings"]
        texts.where = [(file, row) for file, row in state["where"]]
        return texts

    def strings(self) -> list[str]:
        """The kept texts."""
        return self._strings

    def array(self) -> pa.Array:
        """The kept texts as an Arrow array."""
        return pa.array(self._strings, pa.large_string())

    def hashes(self) -> Int[np.ndarray, " n"]:
        """xxh3 of every kept text."""
        return text_hashes(self._strings)


class Sample(Texts):
    """The documents with the smallest keys: of random keys a uniform sample, whatever order they come in."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._keys = size, np.empty(0)

    def offer(self, texts: pa.Array, keys: Float[np.ndarray, " texts"]) -> None:
        """Offer documents with a key each."""
        best = np.argsort(keys, kind="stable")[: self._size]
        best = best[keys[best] < self.bound]
        self._merge(keys[best], texts.take(pa.array(best)).to_pylist())

    def extend(self, other: Sample) -> None:  # type: ignore[override]
        """Take over another sample."""
        self._merge(other._keys, other._strings)

    def below(self, bound: float) -> Sample:
        """Those with smaller keys than `bound` alone."""
        part = Sample(self._size)
        keep = np.flatnonzero(self._keys < bound)
        part._keys, part._strings = self._keys[keep], [self._strings[at] for at in keep.tolist()]
        return part

    @property
    def bound(self) -> float:
        """What a key must be smaller than to come in."""
        return float(self._keys[-1]) if len(self._keys) == self._size else np.inf

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for a ledger."""
        return {"size": self._size, "keys": self._keys, "strings": self._strings}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Sample:
        """What `state` was taken of."""
        sample = cls(state["size"])
        sample._keys, sample._strings = state["keys"], state["strings"]
        return sample

    def _merge(self, keys: np.ndarray, strings: list[str]) -> None:
        keys, strings = np.concatenate([self._keys, keys]), self._strings + strings
        best = np.argsort(keys, kind="stable")[: self._size]
        self._keys, self._strings = keys[best], [strings[at] for at in best.tolist()]


def text_hashes(texts: Sequence[str]) -> Int[np.ndarray, " texts"]:
    """xxh3 of every text, to find copies."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], dtype=np.uint64)


@dataclass(frozen=True)
class Comparison:
    """One measure of the choice against a baseline: positive `difference` means that the choice is better."""

    measure: str
    baseline: str
    chosen: float
    other: float
    difference: float
    low: float
    high: float

    @property
    def better(self) -> bool | None:
        """True or False where the whole interval lies on one side of 0, else None."""
        return True if self.low > 0 else False if self.high < 0 else None


@dataclass(frozen=True)
class Proof:
    """The choice measured on held-out target documents.

    Attributes
    ----------
    documents : int
        Held-out documents that were measured on.
    comparisons : list of Comparison
        The first one is the verdict: KL reduction against random of equal size.
    random_spread : float
        Largest minus smallest KL reduction of the random selections.
    model_bytes : int
        Bytes that each byte model was trained on.
    """

    method: str
    documents: int
    comparisons: list[Comparison]
    random_spread: float
    model_bytes: int
    kl_reduction: dict[str, float] = field(default_factory=dict)
    bits_per_byte: dict[str, float] = field(default_factory=dict)

    @property
    def better(self) -> bool:
        """Whether both measures are better than random, their whole intervals."""
        return all(item.better is True for item in self.comparisons if item.baseline == "random")

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        kl, bits = (item for item in self.comparisons if item.baseline == "random")
        figures = (
            f"KL reduction {kl.chosen:+.3f} against {kl.other:+.3f} for random of equal size (difference "
            f"{kl.difference:+.3f}, 95 % interval {kl.low:+.3f} to {kl.high:+.3f}); byte "
            f"model {bits.chosen:.3f} against {bits.other:.3f} bits per byte (saves {bits.difference:+.3f}, "
            f"{bits.low:+.3f} to {bits.high:+.3f})"
        )
        if self.better:
            return f"closer to your held-out target than random: {figures}"
        if kl.better is False and bits.better is False:
            return f"worse than random here: {figures}"
        return f"no better than random here: {figures}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, verdict included."""
        return {**asdict(self), "better": self.better, "verdict": self.verdict}


def prove(
    method: str, held: Texts, raw_counts: Int[np.ndarray, " num_buckets"], selections: dict[str, Texts],
    featurizer: HashedNgrams, seed: int,
) -> Proof:  # fmt: skip
    """Measure a selection and what it is compared with on held-out target documents.

    Parameters
    ----------
    method : str
        What "chosen" was chosen by.
    held : Texts
        Held-out target documents, two at least.
    raw_counts : (num_buckets,) int64
    selections : dict of str to Texts
        "chosen", "random 0", "random 1", … and others; each with counts and texts.
    """
    texts = _within(held.strings(), HELD_OUT_BYTES)
    if len(texts) < 2:
        texts = held.strings()[:2]
    measured = {name: part for name, part in selections.items() if name not in ("most", "least")}
    randoms = sorted(name for name in measured if name.startswith("random "))
    kl = _kl_shares(texts, raw_counts, measured, featurizer)
    bits, model_bytes = _bits_shares(texts, {name: part.strings() for name, part in measured.items()}, seed)
    others = {"random": ([kl[name] for name in randoms], [bits[name] for name in randoms])}
    others |= {name: ([kl[name]], [bits[name]]) for name in measured if name not in ("chosen", *randoms)}
    comparisons = []
    for name, (kl_others, bits_others) in others.items():
        comparisons.append(_compare("KL reduction", name, kl["chosen"], kl_others, 1, seed))
        comparisons.append(_compare("bits per byte", name, bits["chosen"], bits_others, -1, seed))
    means = {name: float(values.mean()) for name, values in kl.items()}
    spread = [means[name] for name in randoms]
    return Proof(
        method,
        len(texts),
        comparisons,
        float(max(spread) - min(spread)),
        model_bytes,
        {method: means["chosen"], **{name: float(np.mean(values[0])) for name, values in others.items()}},
        {method: float(bits["chosen"].mean()), **{name: float(np.mean(values[1])) for name, values in others.items()}},
    )


def _kl_shares(
    texts: list[str], raw_counts: np.ndarray, selections: dict[str, Texts], featurizer: HashedNgrams
) -> dict[str, Float[np.ndarray, " documents"]]:
    buckets = featurizer(texts)
    names = [name for name, part in selections.items() if part.counts.sum()]
    empty = sorted(set(selections) - set(names))
    if empty:
        raise InputError(f"selection {empty[0]!r} holds no word to measure")
    gains = np.stack([log_ratio(selections[name].counts.astype(np.float64), raw_counts) for name in names])
    sums, lengths = buckets.sums(gains), np.diff(buckets.offsets).astype(np.float64)
    return {name: _shares(sums[:, column], lengths) for column, name in enumerate(names)}


def _bits_shares(texts: list[str], training: dict[str, list[str]], seed: int) -> tuple[dict[str, np.ndarray], int]:
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], dtype=np.float64)
    joined = {name: "\n".join(_shuffled(strings, seed)).encode() for name, strings in training.items()}
    size = min(MODEL_BYTES, *map(len, joined.values()))
    if not size:
        raise InputError("a selection holds no text to train on")
    return {name: _shares(ByteNgram().fit([text[:size]]).bits(encoded), lengths) for name, text in joined.items()}, size


def _shuffled(strings: list[str], seed: int) -> list[str]:
    """In random order: cut to equal bytes in reading order, all but one selection would lose the last files."""
    return [strings[at] for at in np.random.default_rng(seed).permutation(len(strings))]


def _shares(sums: Float[np.ndarray, " n"], lengths: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Values per document with the mean ``sum(sums) / sum(lengths)`` and that ratio's spread (delta method)."""
    ratio = sums.sum() / lengths.sum()
    return ratio + (sums - ratio * lengths) / lengths.mean()


def _compare(
    measure: str, baseline: str, chosen: np.ndarray, others: list[np.ndarray], sign: int, seed: int
) -> Comparison:
    """Compare with the mean over draws of a baseline."""
    other = np.mean(others, axis=0)
    found = difference_over_draws(sign * chosen, [sign * draw for draw in others], random_state=seed)
    return Comparison(measure, baseline, float(chosen.mean()), float(other.mean()), found.mean, found.low, found.high)


def _within(texts: list[str], budget: int) -> list[str]:
    """The first texts that fit into a budget of bytes."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: int(np.searchsorted(sizes, budget, side="right"))]
