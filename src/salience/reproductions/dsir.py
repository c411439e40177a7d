"""Claim: text that DSIR selects is closer to held-out target text than what random and heuristic selection of equal
size pick, and KL reduction tells in advance how well a language model trained on a selection will do.

Substitute for the paper's Pile and GLUE: 128-word chunks of the standard library's source and of docstrings, one
package's docstrings the target; a byte n-gram model for BERT. Headline of the paper: GLUE 82.30 (DSIR) against 80.25
(random) and 79.85 (heuristic classification).
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pyarrow as pa

from salience.data import DSIR, HashedNgrams, HeuristicClassifier, lexical_overlap, mean_log_count
from salience.data.proof import Comparison, Proof, Texts, prove
from salience.evidence import Bar, Control, Outcome, Run
from salience.io import gumbel, key_of
from salience.measure import spearman
from salience.report import figures as draw
from salience.reproductions.worlds.text import pool

PACKAGES = ("sklearn", "scipy", "pandas", "networkx")
BASELINES = ("random", "heuristic", "lexical overlap", "mean log count")
LAW = np.array([0.0, 0.5, 1.0, -0.5, 1.5, -1.0])  # log weights of six items, two of which are drawn


def reproduce(run: Run) -> Outcome:
    """Select a tenth of the pool in nine ways and measure each on held-out target text."""
    # Data: half of scipy's docstrings hidden among other text, a quarter as target, a quarter held out.
    run.step("reading the pool")
    target, packages = ("numpy", ()) if run.smoke else ("scipy", PACKAGES)
    world = pool(run.seed, target, packages, single_spaces=True)
    size = 4000 if run.smoke else len(world.raw)
    raw, wanted = [item.text for item in world.raw[:size]], [item.text for item in world.target]
    hits = np.array([item.source == target for item in world.raw[:size]])
    count = size // 10

    # Method, and what it is compared with. The chunks are of one length by construction: no length filter.
    run.step("selecting")
    rng = run.rng()
    random = [rng.choice(size, count, replace=False) for _ in range(3)]
    dsir = DSIR(min_tokens=0, random_state=run.seed).fit(raw, wanted)
    chosen = dsir.select(raw, count)
    others = [raw[i] for i in rng.permutation(size)[: len(wanted)]]
    fasttext = HeuristicClassifier(classifier="fasttext", random_state=run.seed).fit(others, wanted)
    logistic = HeuristicClassifier(random_state=run.seed).fit(others, wanted)
    overlap, log_count = lexical_overlap(raw, wanted), mean_log_count(raw, wanted)
    picks = {
        "random 0": random[0], "random 1": random[1], "random 2": random[2],
        "heuristic": fasttext.select(raw, count),
        "logistic": logistic.select(raw, count),
        "lexical overlap": np.argsort(-overlap, kind="stable")[:count],
        "mean log count": np.argsort(-log_count, kind="stable")[:count],
        "half dsir": np.concatenate([chosen[::2], random[0][: count // 2]]),
        "worst": np.argsort(dsir.log_weights(raw)[:, 0])[:count],
        "oracle": np.flatnonzero(hits)[:count],
    }  # fmt: skip

    # Measure: KL reduction on held-out target text, and a byte model trained on equally many bytes of each selection.
    run.step("measuring")
    features = HashedNgrams()
    held_out = _texts([item.text for item in world.held_out], features)
    selections = {"chosen": chosen, **picks}
    proof = prove(
        "dsir",
        held_out,
        dsir.raw_counts_,
        {name: _texts([raw[i] for i in sorted(pick)], features) for name, pick in selections.items()},
        features,
        run.seed,
    )
    measured = _judged(proof, hits, "dsir", chosen) | _reported(proof)
    measured["law deviation"] = _law_deviation(run.seed, noise=True)
    intervals = {_gain(item): (item.low, item.high) for item in proof.comparisons}
    measured |= {_gain(item): item.difference for item in proof.comparisons}
    return Outcome(
        claim="selected text is closer to held-out target text than random and heuristic selections of equal size",
        level="mechanism",
        figures=measured,
        bars=[
            Bar("KL of oracle's", at_least=0.93),
            *(Bar("KL dsir", above=f"KL {name}") for name in BASELINES),
            Bar("hits over base rate", at_least=5.0),
            Bar("|KL random|", at_most=0.05),
            Bar("bits saved over random", at_least=0.0),
            Bar("bits saved over heuristic", at_least=0.0),
            Bar("rank correlation of KL and bits saved", at_least=0.7),
            Bar("law deviation", at_most=0.01),
        ],
        controls=[
            Control("random scores", "random", _judged(proof, hits, "random", random[0])),
            Control("lexical overlap", "fake", _judged(proof, hits, "lexical overlap", picks["lexical overlap"])),
            Control("mean log count", "fake", _judged(proof, hits, "mean log count", picks["mean log count"])),
            Control("top-k without noise", "fake", {"law deviation": _law_deviation(run.seed, noise=False)}),
        ],
        intervals=intervals,
        pictures={"KL reduction and bits per byte of each selection": _picture(proof)},
        notes=[
            "The bar against heuristic classification is on the paper's fastText recipe. The same linear classifier "
            "fitted to convergence ('logistic') is a stronger baseline than the paper's, and is reported beside it.",
            "Chunks are cut at single spaces, as in the paper's pipeline; KL is per hashed n-gram, in nats.",
        ],
    )  # fmt: skip


def _texts(texts: list[str], features: HashedNgrams) -> Texts:
    kept = Texts(features.num_buckets)
    kept.add(pa.array(texts, pa.large_string()))
    kept.count(features(texts))
    return kept


def _judged(proof: Proof, hits: np.ndarray, name: str, pick: np.ndarray) -> dict[str, float]:
    """The figures that the bars judge, with the selection `name` in the place of dsir."""
    kl, bits = proof.kl_reduction, proof.bits_per_byte
    return {
        "KL dsir": kl[name],
        **{f"KL {other}": kl[other] for other in BASELINES},
        "KL of oracle's": kl[name] / kl["oracle"],
        "hits over base rate": float(hits[pick].mean() / hits.mean()),
        "bits saved over random": bits["random"] - bits[name],
        "bits saved over heuristic": bits["heuristic"] - bits[name],
    }


def _reported(proof: Proof) -> dict[str, float]:
    """Every selection's KL reduction and bits per byte, and how they agree."""
    kl, bits = proof.kl_reduction, proof.bits_per_byte
    names = sorted(kl)
    agreement = spearman(np.array([kl[name] for name in names]), -np.array([bits[name] for name in names]))
    return {
        **{f"KL {name}": kl[name] for name in names},
        **{f"bits {name}": bits[name] for name in names},
        "|KL random|": abs(kl["random"]),
        "rank correlation of KL and bits saved": agreement,
    }


def _gain(item: Comparison) -> str:
    return f"{'KL gained' if item.measure == 'KL reduction' else 'bits saved'} over {item.baseline}"


def _law_deviation(seed: int, noise: bool, draws: int = 200_000) -> float:
    """Largest difference between how often each of six items is among two drawn, and how often it should be."""
    weights = np.exp(LAW)
    exact = np.zeros(len(LAW))
    for first, second in permutations(range(len(LAW)), 2):
        chance = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        exact[[first, second]] += chance
    keys = np.tile(LAW, (draws, 1))
    if noise:
        keys += gumbel(seed, "law", key_of("law"), np.arange(keys.size)).reshape(keys.shape)
    drawn = np.argsort(-keys, axis=1)[:, :2]
    return float(np.abs(np.bincount(drawn.ravel(), minlength=len(LAW)) / draws - exact).max())


def _picture(proof: Proof):
    from matplotlib.figure import Figure

    names = sorted(proof.kl_reduction, key=lambda name: -proof.kl_reduction[name])
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1)
    draw.bars(above, names, np.array([proof.kl_reduction[name] for name in names]), highlight=["dsir"],
              xlabel="KL reduction on held-out target (nats per n-gram)")  # fmt: skip
    draw.bars(below, names, np.array([proof.bits_per_byte[name] for name in names]), highlight=["dsir"],
              xlabel="bits per byte on held-out target (smaller is better)")  # fmt: skip
    return figure
