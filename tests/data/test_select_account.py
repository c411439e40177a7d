"""`select_text`: what it refuses, odd targets, and an account of every record."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import LAW, SEA, accounted, jsonl, model, prose, select, share_of, texts_of, write_pool

from salience.data import score_text, select_text
from salience.errors import DataError, InputError, NothingToDo, SalienceError
from salience.io import Corpus, checksum, corpus
from salience.scores import Scores


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Path, Path]:
    return write_pool(tmp_path)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings_", "message"),
    [
        ({"count": 0}, {}, "count must be at least 1, not 0"),
        ({"count": -3}, {}, "count must be at least 1, not -3"),
        ({"count": 136}, {}, "count 136 is more than the 135 eligible documents"),
        ({}, {}, "either a count or a fraction"),
        ({"count": 1, "fraction": 0.1}, {}, "either a count or a fraction"),
        ({"fraction": 0.0}, {}, r"fraction must lie in \(0, 1\], not 0.0"),
        ({"fraction": float("nan")}, {}, "fraction must lie"),
        ({"count": 1, "method": "dsri"}, {}, "method must be one of dsir, heuristic, random, not 'dsri'"),
        ({"count": 1, "hold_out": 0.6}, {}, "hold_out must lie in 0..0.5, not 0.6"),
        ({"count": 1}, {"smoothing": -1}, "smoothing must be a finite number"),
        ({"count": 1}, {"workers": 0}, "workers must be at least 1"),
        ({"count": 1}, {"max_bad": 2}, "max_bad must lie in 0..1"),
        ({"count": 1}, {"random_state": None}, "random_state must be a whole number"),
        ({"count": 1}, {"target_proportions": [1]}, "needs separate_targets=True"),
        ({"count": 1}, {"separate_targets": True, "target_proportions": [1, 2]}, "has 2 entries for 1 targets"),
        ({"count": 1}, {"separate_targets": True, "target_proportions": [-1]}, "must be non-negative"),
        ({"count": 1, "method": "random"}, {"separate_targets": True}, "separate_targets belongs to the method dsir"),
        ({"count": 1}, {"tokenizer": str.split}, "built-in tokenizer only"),
    ],
)
def test_parameters_out_of_range(
    pool: tuple[Path, Path], tmp_path: Path, options: dict, settings_: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select(*pool, tmp_path / "out.jsonl", model(**settings_), **options)
    assert not list(tmp_path.glob("*out*"))


def test_a_tokenizer_of_ones_own(pool: tuple[Path, Path], tmp_path: Path) -> None:
    result = select(*pool, tmp_path / "out.jsonl", model(tokenizer=str.split), count=30, hold_out=0)
    assert share_of(SEA, texts_of(tmp_path / "out.jsonl")) == 1 and result.ngrams_for == result.ngrams_against == []


def test_targets_that_are_none(pool: tuple[Path, Path], tmp_path: Path) -> None:
    raw = pool[0]
    for name, lines_, kind, message in (
        ("empty", "", NothingToDo, "is empty"),
        ("blank", "\n\n", NothingToDo, "only blank lines"),
        ("wordless", '{"text": ""}\n{"text": " "}\n' * 9, DataError, "the target is empty: its documents hold no word"),
        ("foreign", '{"text": "zyx wvu"}\n' * 9, DataError, "no raw document shares a single word with the target"),
        ("bad", '{"text": 1}\n', DataError, "1 of 1 records of the target are bad"),
        ("misnamed", '{"texts": "a"}\n', DataError, "nearest names: 'texts'"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(lines_)
        with pytest.raises(kind, match=message):
            select(raw, tmp_path / f"{name}.jsonl", tmp_path / "out.jsonl", count=5)
    with pytest.raises(InputError, match="a target is needed"):
        select_text(Corpus(raw), [], tmp_path / "out.jsonl", count=5)
    assert not list(tmp_path.glob("*out*"))


def test_raw_corpora_that_are_none(pool: tuple[Path, Path], tmp_path: Path) -> None:
    for name, lines_, kind, message in (
        ("blank", "\n\n", NothingToDo, "only blank lines"),
        ("null", '{"text": null}\n' * 9, DataError, "9 of 9 records of the raw corpus are bad"),
        (
            "few",
            '{"text": "wave tide"}\n' * 95 + "{\n" * 5,
            DataError,
            r"5 of 100 .* bad \(5.0%, more than --max-bad 1.0%",
        ),
    ):
        (tmp_path / f"{name}.jsonl").write_text(lines_)
        with pytest.raises(kind, match=message):
            select(tmp_path / f"{name}.jsonl", pool[1], tmp_path / "out.jsonl", count=5)
    assert not list(tmp_path.glob("*out*"))


def test_an_input_is_never_replaced(pool: tuple[Path, Path]) -> None:
    raw, target = pool
    before = target.read_bytes(), (raw / "a.jsonl").read_bytes()
    for out in (target, raw / "a.jsonl"):
        with pytest.raises(InputError, match="is one of the inputs"):
            select(raw, target, out, count=5, overwrite=True)
    assert before == (target.read_bytes(), (raw / "a.jsonl").read_bytes())


# --- small and odd targets ----------------------------------------------------------------------------------


def test_a_target_of_one_document_is_used_but_nothing_is_measured(pool: tuple[Path, Path], tmp_path: Path) -> None:
    target = jsonl(tmp_path / "one.jsonl", [" ".join(prose(SEA, 20, 4))])
    for seed in range(5):
        result = select(pool[0], target, tmp_path / f"out{seed}.jsonl", model(random_state=seed), count=20)
        assert result.proof is None and result.target_held_out == 0
        assert any("too small to hold a part of it out" in warning for warning in result.warnings)
        assert share_of(SEA, texts_of(tmp_path / f"out{seed}.jsonl")) == 1  # the document itself is never lost
        assert result.manifest["proof"] is None and accounted(result)


def test_held_out_documents_without_words_measure_nothing(pool: tuple[Path, Path], tmp_path: Path) -> None:
    target = jsonl(tmp_path / "target.jsonl", [prose(SEA, 1, 4, (300, 301))[0], *[" "] * 20])
    for seed in range(10):  # the one document with words falls on either side
        result = select(pool[0], target, tmp_path / "out.jsonl", model(random_state=seed), count=20, overwrite=True)
        assert result.proof is None and "too small" in result.warnings[0]


def test_few_ngrams_for_the_buckets_are_a_warning(pool: tuple[Path, Path], tmp_path: Path) -> None:
    for smoothing, buckets, warned in ((0.0, 10_000, True), (1.0, 10_000, False), (0.0, 50, False)):
        settings_ = model(smoothing=smoothing, num_buckets=buckets)
        result = select(*pool, tmp_path / "out.jsonl", settings_, count=10, overwrite=True)
        assert any("consider --smoothing" in warning for warning in result.warnings) == warned


def test_wide_records_do_not_shrink_the_sample(tmp_path: Path) -> None:
    """What is kept for measuring is a number of documents, not a share of bytes."""
    padding = "x" * 20_000
    raw = jsonl(tmp_path / "raw.jsonl", prose(LAW, 60, 0) + prose(SEA, 30, 1), padding=padding)
    target = jsonl(tmp_path / "target.jsonl", prose(SEA, 40, 2), padding=padding)
    result = select(raw, target, tmp_path / "out.jsonl", count=20)
    assert result.proof is not None and result.target_held_out >= 4 and len(result.weights) == 90


# --- the account --------------------------------------------------------------------------------------------

KINDS = {
    "law": None, "sea": None, "short": '{"text": "tide"}', "blank": "", "null": '{"text": null}',
    "cut": '{"text": "tid',
    "array": "[]", "twice": '{"text": "a", "text": "b"}', "surrogate": '{"text": "\\ud800"}',
    "bytes": '{"text": "\udcff"}',
}  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=60),
    st.integers(1, 10), st.sampled_from([60, 400, 10_000]), st.sampled_from(["dsir", "heuristic", "random"]),
)  # fmt: skip
def test_every_record_is_accounted_for(
    tmp_path_factory, kinds: list[str], count: int, unit_bytes: int, method: str
) -> None:
    folder = tmp_path_factory.mktemp("account")
    written = [KINDS[k] if KINDS[k] is not None else json.dumps({"text": prose({"law": LAW, "sea": SEA}[k], 1, n)[0]})
               for n, k in enumerate(kinds)]  # fmt: skip
    (folder / "raw.jsonl").write_bytes(("\n".join(written) + "\n").encode("utf-8", "surrogateescape"))
    target = jsonl(folder / "target.jsonl", prose(SEA, 20, 7))
    expected = Counter(kinds)
    eligible, blank, short = expected["law"] + expected["sea"], expected["blank"], expected["short"]
    bad = len(kinds) - eligible - blank - short
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "UNIT_BYTES", unit_bytes)
        settings_ = model(max_bad=1.0)
        try:
            result = select(folder / "raw.jsonl", target, folder / "out.jsonl", settings_, count=count, method=method)
        except SalienceError:
            assert count > eligible
            assert sorted(os.listdir(folder)) == ["raw.jsonl", "target.jsonl"]
            return
    assert count <= eligible and accounted(result)
    assert (result.read, result.selected, result.too_short, result.blank, result.quarantined) == (
        len(kinds), count, short, blank, bad,
    )  # fmt: skip
    assert len(texts_of(folder / "out.jsonl")) == count
    quarantine = folder / "out.jsonl.quarantine.jsonl"
    assert quarantine.exists() == bool(bad)
    if bad:
        assert len(quarantine.read_text().splitlines()) == bad
    assert sum(eligible for _, eligible, _ in result.sources) == eligible
    assert sum(chosen for _, _, chosen in result.sources) == count


def test_the_manifest_tells_what_was_done(pool: tuple[Path, Path], tmp_path: Path) -> None:
    raw, target = pool
    with open(raw / "a.jsonl", "a") as file:
        file.write('{"text": 3}\n')
    with open(target, "a") as file:
        file.write("{\n")
    result = select(raw, target, tmp_path / "out.jsonl", model(max_bad=0.05, random_state=np.int64(5)), count=20)
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest == json.loads(json.dumps(result.manifest))
    assert manifest["counts"] == {
        "read": 136, "selected": 20, "not_selected": 115, "too_short": 0, "blank": 0, "quarantined": 1,
    }  # fmt: skip
    scoring, choice = manifest["facts"]["scoring"], manifest["facts"]["choice"]
    assert scoring["parameters"]["random_state"] == 5 and scoring["parameters"]["hold_out"] == 0.2
    assert list(scoring["raw"]["files"]) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"] and choice["count"] == 20
    assert set(manifest["digests"]) == {"raw", "target 0"} and choice["method"] == "dsir"
    assert manifest["proof"]["verdict"] == result.proof.verdict and manifest["proof"]["better"] == result.proof.better
    for name, entry in manifest["files"].items():
        assert checksum(tmp_path / name) == entry["xxh3_128"]
    quarantined = [json.loads(line) for line in (tmp_path / "out.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [(Path(line["file"]).name, line["raw"]) for line in quarantined] == [
        ("a.jsonl", '{"text": 3}'), ("target.jsonl", "{"),
    ]  # fmt: skip


def test_progress_and_what_a_report_needs(pool: tuple[Path, Path], tmp_path: Path) -> None:
    stages: dict[str, list[tuple[int, int]]] = {}
    result = select(*pool, tmp_path / "out.jsonl", count=20, top_k=True,
                    progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)))  # fmt: skip
    assert list(stages) == ["targets", "count", "weigh", "copy"]
    for steps in stages.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] == steps[-1][1]
    score_text(Corpus(pool[0]), [Corpus(pool[1])], tmp_path / "scored", model=model())
    scores = Scores.load(tmp_path / "scored" / "scores.parquet")
    assert len(result.most) == len(result.least) == 10 and len(result.weights) == 135
    assert [score for _, score, _ in result.most] == sorted((s for _, s, _ in result.most), reverse=True)
    assert [score for _, score, _ in result.least] == sorted(s for _, s, _ in result.least)
    assert (
        share_of(SEA, [text for _, _, text in result.most]) == 1 and share_of(SEA, [t for _, _, t in result.least]) == 0
    )
    assert result.most[0][0] in scores.ids
    speaking_for = {gram: ratio for gram, ratio, _, _ in result.ngrams_for}
    against = {gram: ratio for gram, ratio, _, _ in result.ngrams_against}
    assert set(SEA) & set(speaking_for) and set(LAW) & set(against) and not set(LAW) & set(speaking_for)
    assert min(speaking_for.values()) > 0 > max(against.values())
    assert sorted(result.chosen_weights, reverse=True)[:10] == [score for _, score, _ in result.most]
