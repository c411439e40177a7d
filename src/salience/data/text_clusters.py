"""Choose documents by quality inside clusters (kMQ), and measure how well the choice covers held-out documents.

The work behind `salience select text --method kmq`. Texts and embeddings are held in memory; records are copied byte
for byte in a second reading.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from salience.data.kmq.clustering import check_embeddings
from salience.data.kmq.selector import KMQSelector
from salience.data.row_baselines import kmeans_medoids
from salience.data.row_proof import FEWEST, RowProof, prove_rows
from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.io import Batch, Corpus, Output, RecordWriter, Tally, as_numbers, read, records_of, write_quarantine
from salience.scores import Scores

_LSA, _TERMS, _DRAWS, _CLUSTERS = 50, 100_000, 5, 512


@dataclass(frozen=True)
class ClusterSelection:
    """What `select_text_clusters` chose.

    `mean_quality` is of all that could be chosen, and of the choice (None where no chosen document has one).
    """

    out: str
    read: int
    selected: int
    not_selected: int
    held_out: int
    blank: int
    quarantined: int
    clusters: int
    clusters_hit: int
    mean_quality: tuple[float, float | None] | None
    proof: RowProof | None
    notes: list[str] = field(default_factory=list)

    @property
    def equation(self) -> str:
        """What became of every record."""
        return (
            f"{self.read:,} records read = {self.selected:,} selected + {self.not_selected:,} not selected + "
            f"{self.held_out:,} held out to measure on + {self.blank:,} blank + {self.quarantined:,} quarantined"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "proof": self.proof.as_dict() if self.proof else None}


def select_text_clusters(
    raw: Corpus, out: str | os.PathLike[str], *, count: int | None = None, fraction: float | None = None,
    quality: str | None = None, embeddings: str | os.PathLike[str] | None = None, clusters: int | str | None = None,
    hold_out: float = 0.2, max_bad: float = 0.01, random_state: int = 0, overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ClusterSelection:  # fmt: skip
    """Choose documents of a corpus so that every cluster is covered and quality decides inside it.

    Parameters
    ----------
    raw : Corpus
    out : path or URL
        Chosen records in the order of the corpus; beside it ``OUT.scores.parquet``, `Scores` with ids "file:row".
    count, fraction : int or float
        Documents to choose, or their share of all documents.
    quality : str, optional
        Field or column of numbers, larger for better documents.
    embeddings : path, optional
        Directory of a `transformers` model (mean of its last hidden states), or a .npy matrix with a row per document.
        By default latent semantic analysis: 50 dimensions of TF-IDF, fitted on the documents that can be chosen.
    clusters : int or "silhouette", optional
        One for every four documents to choose by default, at most 512.
    hold_out : float
        Share of the documents that cannot be chosen and that coverage is measured on.
    max_bad, random_state, overwrite, progress

    Raises
    ------
    InputError, DataError, NothingToDo
        With nothing left under the output's name.
    """
    tell = progress or (lambda message: None)
    if (count is None) == (fraction is None):
        raise InputError("give either a count or a fraction")
    if (count is not None and count < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise InputError(f"count must be at least 1 and fraction in (0, 1]; got {count} and {fraction}")
    if not 0 <= hold_out < 1 or random_state < 0:
        raise InputError(f"hold_out must lie in [0, 1) and the seed be 0 or larger; got {hold_out}, {random_state}")
    with Output(out, overwrite, [raw]) as output:
        writer = RecordWriter(output.file(), os.path.basename(os.fspath(out)), raw)
        tell("reading")
        texts, units, rows, grades, tally = _read(raw, quality, max_bad)
        order = np.random.default_rng(random_state).permutation(len(texts))
        cut = round(hold_out * len(texts))
        held, pool = np.sort(order[:cut]), np.sort(order[cut:])
        wanted = count if count is not None else max(1, round((fraction or 0) * len(texts)))
        if wanted > len(pool):
            raise InputError(f"{wanted:,} documents are more than the {len(pool):,} that can be chosen"
                             + (f" ({len(held):,} are held out to measure on)" if len(held) else ""))  # fmt: skip
        good = None if grades is None else grades[pool]
        if good is not None and np.isnan(good).all():
            raise DataError(f"quality {quality!r} is missing in every document that can be chosen; leave it out")
        tell("embedding")
        x = _embedded(texts, embeddings, pool)
        tell("clustering")
        k = clusters if clusters is not None else max(1, min(_CLUSTERS, wanted // 4))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = KMQSelector(n_clusters=k, random_state=random_state).fit(x[pool])
            chosen = model.select(wanted, good)
            weights = model.log_weights(good)
        notes = list(dict.fromkeys(str(one.message) for one in told))
        proof = None
        if 0 < len(held) < FEWEST:
            notes.append(f"nothing was measured: {len(held)} held-out documents are too few")
        elif len(held):
            tell("measuring")
            draws = [np.random.default_rng([random_state, d]).permutation(len(pool))[:wanted] for d in range(_DRAWS)]
            others = {"random": draws, "k-means medoids": [kmeans_medoids(x[pool], wanted, random_state=random_state)]}
            proof = prove_rows("kmq", x[pool], chosen, others, x[held], seed=random_state)
        tell("writing")
        _copy(raw, writer, units[pool[chosen]], rows[pool[chosen]])
        settings = {"method": "kmq", "count": wanted, "quality": quality, "clusters": len(model.cluster_centers_),
                    "embeddings": "lsa" if embeddings is None else str(embeddings), "hold_out": hold_out,
                    "random_state": random_state}  # fmt: skip
        names = [f"{raw.units[units[at]].source.name}:{rows[at]}" for at in pool]
        Scores(weights, names, "sample", settings).save(output.file(".scores.parquet"))
        if tally.bad:
            write_quarantine(output.file(".quarantine.jsonl"), tally.bad)
        found = ClusterSelection(
            os.fspath(out), tally.read, len(chosen), len(pool) - len(chosen), len(held), tally.blank, len(tally.bad),
            len(np.unique(model.labels_)), len(np.unique(model.labels_[chosen])),
            None if good is None else (float(np.nanmean(good)), _mean(good[chosen])), proof, notes,
        )  # fmt: skip
        output.commit({"command": "select text", "settings": settings, **found.as_dict()})
    return found


def _read(
    raw: Corpus, quality: str | None, max_bad: float
) -> tuple[list[str], Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"] | None, Tally]:
    texts: list[str] = []
    units, rows, grades = [], [], []
    names: set[str] = set()
    tally = Tally()
    for unit in raw.units:
        for batch in read(raw, unit, whole=True):
            tally.add(batch, max_bad)
            texts += batch.text.to_pylist()
            units.append(np.full(len(batch), unit.number))
            rows.append(batch.rows)
            if quality is not None and len(batch):
                values, found = _grades(batch, quality)
                grades.append(values)
                names |= found
    tally.check(max_bad, "raw corpus")
    if not texts:
        raise NothingToDo("there is no document")
    if quality is not None and quality not in names:
        raise DataError(f"no document has a field {quality!r} ({nearest(quality, names)})")
    return texts, np.concatenate(units), np.concatenate(rows), np.concatenate(grades) if grades else None, tally


def _mean(grades: Float[np.ndarray, " b"]) -> float | None:
    """Of what is known; None where nothing is, as NaN is no JSON."""
    return None if np.isnan(grades).all() else float(np.nanmean(grades))


def _grades(batch: Batch, name: str) -> tuple[Float[np.ndarray, " documents"], set[str]]:
    """A field of numbers of every document, NaN where it is missing; and the names of all fields."""
    where = batch.source.path or batch.source.name
    names: set[str]
    values: list[Any]
    if batch.table is not None:
        if name not in batch.table.column_names:
            raise DataError(f"{where} has no column {name!r} ({nearest(name, batch.table.column_names)})")
        names, values = set(batch.table.column_names), batch.table[name].to_pylist()
        if batch.source.format == "csv":
            values = _parsed(values)
    elif batch.lines is not None and batch.source.format == "jsonl":
        block, starts, stops = batch.lines
        records = [json.loads(block[start:stop]) for start, stop in zip(starts.tolist(), stops.tolist())]
        names, values = set().union(*records), [record.get(name) for record in records]
    else:
        raise InputError(f"{where} holds nothing but text: it has no quality {name!r}")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f"{where}: quality {name!r} holds {value!r}; numbers are needed")
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64), names


def _parsed(values: list[str | None]) -> list[Any]:
    """Numbers of a CSV column, None where it is blank; a text that is no number stays one."""
    texts = [value if value is not None and value.strip() else None for value in values]
    numbers = as_numbers(pa.array(texts, pa.large_string()))
    if numbers is not None:
        return numbers.tolist()
    return [text if text is not None and as_numbers(pa.array([text], pa.large_string())) is None else None
            for text in texts]  # fmt: skip


def _embedded(
    texts: list[str], embeddings: str | os.PathLike[str] | None, pool: Int[np.ndarray, " m"]
) -> Float[np.ndarray, "n d"]:
    if embeddings is None:
        weights = TfidfVectorizer(sublinear_tf=True, max_features=_TERMS)
        try:
            fitted = weights.fit_transform([texts[at] for at in pool])
        except ValueError as error:
            raise DataError(f"the documents hold no words to tell them apart by ({error})") from error
        size = min(_LSA, min(fitted.shape) - 1)
        if size < 1:
            raise DataError("the documents are too few, or too much alike, to be clustered")
        svd = TruncatedSVD(size, random_state=0).fit(fitted)
        return check_embeddings(normalize(svd.transform(weights.transform(texts))))
    if os.path.isdir(embeddings):
        from salience.model import embed, load

        loaded = load(embeddings)
        return check_embeddings(embed(loaded.model, loaded.processor, texts).numpy())
    try:
        x = np.load(embeddings, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"embeddings {os.fspath(embeddings)!r} is neither a model directory nor a readable .npy file: {error}"
        ) from error
    if x.ndim != 2 or len(x) != len(texts):
        raise DataError(f"embeddings have shape {x.shape}; there are {len(texts):,} documents")
    return check_embeddings(x)


def _copy(raw: Corpus, writer: RecordWriter, units: Int[np.ndarray, " b"], rows: Int[np.ndarray, " b"]) -> None:
    for number in np.unique(units):
        wanted = np.sort(rows[units == number])
        for batch in read(raw, raw.units[number], whole=True, rows=wanted):
            writer.write(records_of(batch, np.isin(batch.rows, wanted), writer.format))
    writer.close()
