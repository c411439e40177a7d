"""`select_text`: the documents that the equations choose, whatever reads them; quotas, filters, scores."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pools import LAW, SEA, accounted, jsonl, model, prose, select, share_of, texts_of, write_pool

from salience.data import DSIR, score_text, select_text, text_passes
from salience.data.dsir.features import bucket, ngram_strings, tokenize
from salience.errors import InputError
from salience.io import Corpus, corpus, gumbel, lines, read
from salience.scores import Scores


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Path, Path]:
    return write_pool(tmp_path)


# --- what is chosen -----------------------------------------------------------------------------------------


def test_the_choice_is_that_of_the_equations(pool: tuple[Path, Path], tmp_path: Path) -> None:
    """Everything recomputed in plain Python: counts, log weights, keyed Gumbel noise, the k largest."""
    raw, target = pool
    buckets, alpha, count = 500, 0.1, 30

    def counts(texts: list[str]) -> np.ndarray:
        found = Counter(bucket(gram, buckets) for text in texts for gram in ngram_strings(tokenize(text), 2))
        return np.array([found[number] for number in range(buckets)], dtype=float)

    names = ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    documents = [text for name in names for text in texts_of(raw / name)]
    p, q = counts(texts_of(target)) + alpha, counts(documents)
    log_diff = np.log(p / p.sum() + 1e-8) - np.log(q / q.sum() + 1e-8)
    keys, kept = [], []
    for name, source in zip(names, Corpus(raw).sources):
        lines_ = (raw / name).read_bytes().splitlines(keepends=True)
        offsets = np.cumsum([0, *map(len, lines_)])[:-1]
        weights = [counts([json.loads(line)["text"]]) @ log_diff for line in lines_]
        keys += (weights + gumbel(7, "dsir target 0", source.file_id, offsets)).tolist()
        kept += lines_
    chosen = np.sort(np.argsort(-np.array(keys))[:count])
    result = select(raw, target, tmp_path / "out.jsonl", model(random_state=7), count=count, hold_out=0)
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(kept[at] for at in chosen)
    assert (
        result.selected == count
        and result.proof is None
        and result.warnings == [w for w in result.warnings if "n-grams for 500 buckets" in w]
    )


@pytest.mark.parametrize("method", ["dsir", "heuristic", "random"])
@pytest.mark.parametrize("seed", [0, 11])
def test_workers_order_and_cuts_change_nothing(
    pool: tuple[Path, Path], tmp_path: Path, method: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, target = pool
    files = [raw / "sub" / "c.jsonl", raw / "a.jsonl", raw / "b.jsonl"]
    runs = []
    for number, (inputs, workers, unit_bytes, block_bytes) in enumerate(
        [
            (raw, 1, 16 << 20, 4 << 20),
            (raw, 2, 700, 4 << 20),
            (files, 7, 300, 100),
            (str(raw / "**/*.jsonl"), 3, 5000, 64),
        ]
    ):
        monkeypatch.setattr(corpus, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out{number}.jsonl"
        result = select(inputs, target, out, model(workers=workers, random_state=seed), count=40, method=method)
        assert accounted(result) and result.selected == 40
        runs.append((out.read_bytes(), result.proof, result.sources, result.most, sorted(result.weights)))
    for run in runs[1:]:
        assert run == runs[0]


@pytest.mark.parametrize("method", ["dsir", "heuristic", "random"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt.gz"])
def test_features_kept_from_counting_change_nothing(
    pool: tuple[Path, Path], tmp_path: Path, method: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the corpus is read again to be weighed, none of it, or some of it."""
    texts = [text for name in ("a", "b", "sub/c") for text in texts_of(pool[0] / f"{name}.jsonl")]
    raw = tmp_path / f"raw.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), raw, row_group_size=20)
    elif ending == "csv":
        pd.DataFrame({"n": range(len(texts)), "text": texts}).to_csv(raw, index=False)
    elif ending == "jsonl":
        jsonl(raw, texts)
    else:
        with pa.CompressedOutputStream(str(raw), "gzip") as stream:
            stream.write("\n\n".join(texts).encode())
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)
    runs = []
    for kept in (128 << 20, 0, 4000):
        monkeypatch.setattr(text_passes, "KEPT_BYTES", kept)
        out = tmp_path / f"out{kept}.{'jsonl' if ending == 'txt.gz' else ending}"
        result = select(raw, pool[1], out, count=40, method=method)
        runs.append((out.read_bytes(), result.proof, result.sources, result.most, result.least, sorted(result.weights)))
    assert runs[0] == runs[1] == runs[2]


def test_another_seed_draws_others_and_top_k_needs_none(pool: tuple[Path, Path], tmp_path: Path) -> None:
    drawn = {}
    for top_k in (False, True):
        for seed in (1, 2):
            out = tmp_path / f"out{top_k}{seed}.jsonl"
            # half of the sea's documents: the draw decides which
            select(*pool, out, model(random_state=seed), count=20, top_k=top_k, hold_out=0)
            drawn[top_k, seed] = out.read_bytes()
    assert drawn[False, 1] != drawn[False, 2] and drawn[True, 1] == drawn[True, 2]


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, pa.table])
def test_a_frame_gives_the_rows_of_its_file(
    pool: tuple[Path, Path], tmp_path: Path, frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for name in ("a", "b", "sub/c") for text in texts_of(pool[0] / f"{name}.jsonl")]
    columns = {"text": texts, "n": list(range(len(texts)))}
    pq.write_table(pa.table(columns), tmp_path / "raw.parquet", row_group_size=17)
    pd.DataFrame(columns).to_csv(tmp_path / "raw.csv", index=False)
    monkeypatch.setattr(corpus, "TABLE_ROWS", 23)
    rows = []
    for name, raw in (
        ("parquet", Corpus(tmp_path / "raw.parquet")),
        ("csv", Corpus(tmp_path / "raw.csv")),
        ("table", Corpus(frame(columns))),
    ):
        # under one name they are one file, so their rows draw the same noise
        same = {source: dataclasses.replace(source, name="raw") for source in raw.sources}
        raw.units = [dataclasses.replace(unit, source=same[unit.source]) for unit in raw.units]
        raw.sources = list(same.values())
        out = tmp_path / f"{name}.jsonl"
        select_text(raw, [Corpus(pool[1])], out, count=30, model=model(), hold_out=0)
        rows.append([int(json.loads(line)["n"]) for line in out.read_text().splitlines()])
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 30


def test_too_short_documents_are_weighed_but_never_chosen(tmp_path: Path) -> None:
    short, long = prose(SEA, 30, 0, (3, 8)), prose(SEA, 30, 1, (8, 12))
    raw = jsonl(tmp_path / "raw.jsonl", [text for pair in zip(short, long) for text in pair] + prose(LAW, 30, 2))
    target = jsonl(tmp_path / "target.jsonl", prose(SEA, 30, 3))
    fitted = []
    for least in (0, 8):
        settings_ = model(min_tokens=least)
        result = select(raw, target, tmp_path / f"out{least}.jsonl", settings_, count=40, top_k=True)
        fitted.append(settings_.raw_counts_)
        assert result.too_short == (30 if least else 0) and accounted(result)
        chosen = [len(tokenize(text)) for text in texts_of(tmp_path / f"out{least}.jsonl")]
        assert min(chosen) >= least and (min(chosen) < 8) == (not least)
    np.testing.assert_array_equal(*fitted)  # the filter comes after the fit
    with pytest.raises(
        InputError, match=r"count 61 is more than the 60 eligible documents \(of at least 8 tokens, of 90"
    ):
        select(raw, target, tmp_path / "more.jsonl", model(min_tokens=8), count=61)
    everything = select(raw, target, tmp_path / "all.jsonl", model(min_tokens=8), count=60)
    assert everything.not_selected == 0
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "more.jsonl").exists()


def test_a_fraction_is_of_all_documents(pool: tuple[Path, Path], tmp_path: Path) -> None:
    assert select(*pool, tmp_path / "out.jsonl", fraction=0.2).selected == 27  # of 135
    assert select(*pool, tmp_path / "one.jsonl", fraction=1e-9).selected == 1


# --- separate targets ---------------------------------------------------------------------------------------


@pytest.fixture
def two_targets(pool: tuple[Path, Path], tmp_path: Path) -> tuple[Path, list[Path]]:
    law = jsonl(tmp_path / "law.jsonl", prose(LAW, 40, 9))
    return pool[0], [law, pool[1]]


@pytest.mark.parametrize(
    ("proportions", "quotas"), [([0.35, 0.65], [10, 21]), ([1, 0], [31, 0]), ([2, 2], [15, 16]), (None, None)]
)
def test_quotas_of_separate_targets(two_targets, tmp_path: Path, proportions, quotas) -> None:
    raw, targets = two_targets
    out = tmp_path / "out.jsonl"
    settings_ = model(separate_targets=True, target_proportions=proportions)
    result = select(raw, targets, out, settings_, count=31, hold_out=0)
    chosen = texts_of(out)
    assert len(set(chosen)) == len(chosen) == result.selected == 31 and accounted(result)
    if quotas is None:  # by the targets' numbers of n-grams
        sizes = [sum(2 * len(tokenize(text)) - 1 for text in texts_of(target)) for target in targets]
        quotas = [int(31 * sizes[0] / sum(sizes))]
        quotas.append(31 - quotas[0])
    assert [round(31 * share_of(kind, chosen)) for kind in (LAW, SEA)] == quotas


def test_no_document_is_chosen_for_two_targets(pool: tuple[Path, Path], tmp_path: Path) -> None:
    """The same target twice wants the same documents twice: the second must take the next best."""
    raw, target = pool
    for top_k in (True, False):
        out = tmp_path / f"out{top_k}.jsonl"
        settings_ = model(separate_targets=True, target_proportions=[1, 1], workers=2)
        select(raw, [target, target], out, settings_, count=60, hold_out=0, top_k=top_k)
        assert len(set(texts_of(out))) == 60
    pooled = tmp_path / "pooled.jsonl"
    select(raw, [target, target], pooled, count=60, hold_out=0, top_k=True)
    assert len(set(texts_of(pooled)) & set(texts_of(tmp_path / "outTrue.jsonl"))) >= 58  # smoothing differs a little


def test_a_target_whose_only_document_is_held_out_is_still_a_target(pool: tuple[Path, Path], tmp_path: Path) -> None:
    one = prose(LAW, 1, 5, (200, 201))
    for seed in range(6):  # at some seeds the document is drawn for the held-out part
        target = jsonl(tmp_path / f"one{seed}.jsonl", one)
        settings_ = model(separate_targets=True, target_proportions=[1, 1], random_state=seed)
        result = select(pool[0], [pool[1], target], tmp_path / f"out{seed}.jsonl", settings_, count=20, hold_out=0.5)
        assert result.proof is not None
        assert share_of(LAW, texts_of(tmp_path / f"out{seed}.jsonl")) == 0.5


# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [False, True])
def test_scores_of_all_documents_draw_what_the_method_draws(
    pool: tuple[Path, Path], tmp_path: Path, top_k: bool
) -> None:
    raw, target = pool
    jsonl(raw / "blank.jsonl", []).write_text("\n\n")
    manifest = score_text(Corpus(raw), [Corpus(target)], tmp_path / "scored", model=model(), hold_out=0)
    scores = Scores.load(tmp_path / "scored" / "scores.parquet")
    counts = {"read": 137, "documents": 135, "blank": 2, "quarantined": 0}
    assert len(scores) == 135 and scores.unit == "sample" and scores.provenance["counts"] == counts
    assert manifest["counts"] == counts
    fitted = DSIR.load(tmp_path / "scored" / "model.safetensors")
    assert scores.values.tolist() == fitted.log_weights(Corpus(raw))[:, 0].tolist()
    shuffled = scores.keep(np.random.default_rng(0).permutation(135))
    select(raw, target, tmp_path / "a.jsonl", count=20, hold_out=0, top_k=top_k)
    result = select(raw, target, tmp_path / "b.jsonl", count=20, hold_out=0.2, top_k=top_k, scores=shuffled)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert result.method == "scores" and accounted(result)
    if top_k:
        text_of = {f"{b.source.name}:{row}": text for unit in Corpus(raw).units for b in read(Corpus(raw), unit)
                   for row, text in zip(b.rows.tolist(), b.text.to_pylist())}  # fmt: skip
        assert {text_of[name] for name in scores.top(20).ids} == set(texts_of(tmp_path / "b.jsonl"))


def test_scores_that_do_not_fit_are_refused(pool: tuple[Path, Path], tmp_path: Path) -> None:
    raw, target = pool
    score_text(Corpus(raw), [Corpus(target)], tmp_path / "scored", model=model())
    scores = Scores.load(tmp_path / "scored" / "scores.parquet")
    wrong = Scores([1, 2], ["other.jsonl:0", "other.jsonl:9"], "sample")
    for bad, message in (
        (Scores([1], ["a"], "sample"), "ids of the form file:row, not 'a'"),
        (Scores([1], ["a.jsonl:²"], "sample"), "ids of the form file:row"),
        (wrong, "no id for the documents of 'a.jsonl'"),
        (scores.keep(np.arange(1, len(scores))), r"document a\.jsonl:0 has no score"),
        (scores.keep(np.arange(len(scores) - 1)), r"document sub/c\.jsonl:\d+ has no score"),
        (scores.keep(np.array(["b.jsonl" in name for name in scores.ids])), r"document a\.jsonl:0 has no score"),
    ):
        with pytest.raises(InputError, match=message):
            select(raw, target, tmp_path / "out.jsonl", count=5, scores=bad)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(InputError, match="scores of separate targets are several"):
        score_text(Corpus(raw), [Corpus(target)] * 2, tmp_path / "two", model=model(separate_targets=True))
    with pytest.raises(InputError, match="a target is needed"):
        score_text(Corpus(raw), [], tmp_path / "none")


# --- methods ------------------------------------------------------------------------------------------------


def test_methods_differ_as_they_should(pool: tuple[Path, Path], tmp_path: Path) -> None:
    shares, baselines = {}, {}
    for method in ("dsir", "heuristic", "random"):
        out = tmp_path / f"{method}.jsonl"
        result = select(*pool, out, count=30, method=method)
        shares[method] = share_of(SEA, texts_of(out))
        baselines[method] = {item.baseline for item in result.proof.comparisons}
        assert result.manifest["facts"]["choice"]["method"] == method
    assert shares["dsir"] == 1.0 and shares["heuristic"] > 0.6 and 0.1 < shares["random"] < 0.6
    assert baselines == {
        "dsir": {"random", "heuristic"}, "heuristic": {"random", "dsir"}, "random": {"random", "heuristic", "dsir"},
    }  # fmt: skip


def test_random_is_uniform_over_documents(pool: tuple[Path, Path], tmp_path: Path) -> None:
    hits: Counter[str] = Counter()
    for seed in range(40):
        out = tmp_path / f"out{seed}.jsonl"
        select(*pool, out, model(random_state=seed), count=45, method="random", hold_out=0)
        hits.update(texts_of(out))
    shares = np.array(list(hits.values())) / 40
    assert len(hits) == 135 and abs(shares.mean() - 1 / 3) < 1e-9
    assert shares.std() < 1.3 * np.sqrt(2 / 9 / 40)
