"""Choose documents from a corpus of any size by a target, write them, and measure on the user's own data if it helped.

`TextPasses` reads the targets (a keyed part of them held out), counts, weighs and draws the raw corpus, and copies the
chosen records; it also draws what the choice is compared with: random documents several times, and heuristic
classification. `prove` measures them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from jaxtyping import Float

from salience.data.dsir.features import ngram_strings, tokenize
from salience.data.dsir.resample import Chosen
from salience.data.dsir.weights import DSIR
from salience.data.proof import Proof, prove
from salience.data.text_passes import METHODS, Progress, TextPasses, kept_beside
from salience.data.text_stages import KINDS
from salience.errors import InputError, NothingToDo, SalienceError
from salience.io import Corpus, Ledger, Output, RecordWriter, Unit, verify_output, write_quarantine
from salience.io.ledger import corpus_digest, differences, some
from salience.io.place import exists
from salience.scores import Scores

TELLING = 20


@dataclass
class TextSelection:
    """What `select_text` did: counts, proof, and plain data for a report.

    Attributes
    ----------
    selected, not_selected, too_short, blank, quarantined : int
        What became of the `read` raw records; they add up.
    proof : Proof or None
        None when the target is too small to hold part of it out, or `hold_out` is 0.
    weights, chosen_weights : (n,) float64
        Scores of a sample of eligible documents, and of the chosen ones.
    sources : list of (name, eligible, chosen)
    ngrams_for, ngrams_against : list of (n-gram, log ratio, count in raw sample, count in target sample)
        What moved the weights most: ratio times count in the target, and in the raw sample.
    most, least : list of (where, score, text)
        Documents with the largest and smallest scores.
    warnings : list of str
    manifest : dict
    """

    out: str
    method: str
    read: int
    selected: int
    not_selected: int
    too_short: int
    blank: int
    quarantined: int
    target_documents: int
    target_held_out: int
    proof: Proof | None
    weights: Float[np.ndarray, " n"]
    chosen_weights: Float[np.ndarray, " m"]
    sources: list[tuple[str, int, int]]
    ngrams_for: list[tuple[str, float, int, int]]
    ngrams_against: list[tuple[str, float, int, int]]
    most: list[tuple[str, float, str]]
    least: list[tuple[str, float, str]]
    warnings: list[str]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """What became of every raw record."""
        names = ("read", "selected", "not_selected", "too_short", "blank", "quarantined")
        return {name: getattr(self, name) for name in names}

    @property
    def equation(self) -> str:
        """The conservation equation, in words."""
        return (
            f"{self.read:,} records read = {self.selected:,} selected + {self.not_selected:,} not selected + "
            f"{self.too_short:,} too short + {self.blank:,} blank + {self.quarantined:,} quarantined"
        )


class AlreadyDone(NothingToDo):
    """A resumed run had been finished before: its `manifest` tells all."""

    def __init__(self, message: str, manifest: dict[str, Any]) -> None:
        super().__init__(message)
        self.manifest = manifest


def select_text(
    raw: Corpus,
    targets: Sequence[Corpus],
    out: str | os.PathLike[str],
    *,
    count: int | None = None,
    fraction: float | None = None,
    method: str = "dsir",
    model: DSIR | None = None,
    scores: Scores | None = None,
    from_scores: str | os.PathLike[str] | None = None,
    top_k: bool = False,
    hold_out: float = 0.2,
    engine: str = "threads",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TextSelection:
    """Choose documents of `raw` that are like `targets` and write their records to `out`.

    Finished units are kept in a ledger beside the output until the run is done: a run that was killed goes on from
    there with ``resume=True``, and gives the same bytes.

    Parameters
    ----------
    raw : Corpus
    targets : sequence of Corpus
        Pooled, or with ``model.separate_targets`` a quota each.
    out : path
        .jsonl (any input; JSONL records byte for byte), or the format that all inputs share.
    count, fraction : int, float
        How many documents, or which share of the raw ones; give one.
    method : {"dsir", "heuristic", "random"}
    model : DSIR, optional
        Parameters of the features and of the draw; default `DSIR()`.
    scores : Scores, optional
        Draw by these log-weights instead of `method`; ids are "file:row", as `score_text` gives them.
    from_scores : path, optional
        What `score_text` wrote for the same corpora and parameters: nothing is counted or weighed again.
    top_k : bool
        Take the largest scores, without noise.
    hold_out : float
        Share of the target documents kept out of the fit to measure on; 0 for none.
    engine : {"threads", "ray"}
        Where units are worked at; changes no result.
    resume : bool
        Go on with an interrupted run, if there is one.
    overwrite : bool
        Replace an existing output, or throw an interrupted run away.
    progress : callable, optional
        Called with (stage, bytes done, bytes in all).

    Raises
    ------
    InputError, DataError, NothingToDo
        With nothing left under the output's name.
    AlreadyDone
        With `resume`, when the output is there and complete.
    """
    model = model or DSIR()
    name = "scores" if scores is not None else method
    _check(count, fraction, method, name, model)
    run = TextPasses(
        raw, targets, model, hold_out=hold_out, compare=name == "heuristic", engine=engine, progress=progress
    )
    choice = {
        "method": name, "count": count, "fraction": fraction, "top_k": top_k, "min_tokens": model.min_tokens,
        "target_proportions": model.described()["target_proportions"],
        "scores": None if scores is None else _digest(scores),
    }  # fmt: skip
    facts = {"scoring": run.scoring_facts(), "choice": choice}
    overwrite = overwrite or (resume and _is_unfinished(out, facts, run))
    with (
        Output(out, overwrite, [raw, *targets]) as output,
        _ledger(kept_beside(out), facts, resume, overwrite) as run.choosing,
    ):
        output.sweep()
        writer = RecordWriter(output.file(), os.path.basename(os.fspath(out)), raw)
        run.scoring = run.choosing
        if from_scores is not None:
            run.scoring = Ledger.of_finished(Path(from_scores), {"scoring": facts["scoring"]}, KINDS)
        run.read_targets()
        run.survey()
        run.fit()
        wanted = count if count is not None else max(1, round((fraction or 0) * run.tally.documents))
        run.draw(name, wanted, top_k, scores)
        run.copy(writer)
        if run.tally.bad or run.target_tally.bad:
            write_quarantine(output.file(".quarantine.jsonl"), run.tally.bad + run.target_tally.bad)
        result = _result(run, os.fspath(out))
        result.manifest = output.commit(_record("select text", run, facts, result.counts, result.proof))
    return result


def score_text(
    raw: Corpus,
    targets: Sequence[Corpus],
    out: str | os.PathLike[str],
    *,
    model: DSIR | None = None,
    hold_out: float = 0.2,
    engine: str = "threads",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Weigh every document of `raw` once, for any number of selections.

    Parameters
    ----------
    raw, targets, model, hold_out, engine, resume, overwrite, progress
        As in `select_text`.
    out : path
        Directory to write: ``scores.parquet`` (`Scores` with ids "file:row"), ``model.safetensors`` (`DSIR.load`
        weighs other shards with it), and what `select_text` needs of it as `from_scores`.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    InputError, DataError, NothingToDo
        As `select_text`; and when `model` keeps several targets apart, as then there is no single weight.
    """
    model = model or DSIR()
    if model.separate_targets and len(targets) > 1:
        raise InputError("scores of separate targets are several per document; score one target at a time")
    run = TextPasses(raw, targets, model, hold_out=hold_out, compare=False, engine=engine, progress=progress)
    facts = {"scoring": run.scoring_facts()}
    overwrite = overwrite or (resume and _is_unfinished(out, facts, run))
    with (
        Output(out, overwrite, [raw, *targets], folder=True) as output,
        _ledger(kept_beside(out), facts, resume, overwrite) as run.scoring,
    ):
        output.sweep()
        run.read_targets()
        run.survey()
        run.fit()
        counts = {name: getattr(run.tally, name) for name in ("read", "documents", "blank", "quarantined")}
        provenance = {"method": "dsir", "parameters": model.described(), "counts": counts}
        Scores.save_parts(output.file("scores.parquet"), map(_named, run.weighed()), "sample", provenance)
        model.save(output.file("model.safetensors"))
        if run.tally.bad or run.target_tally.bad:
            write_quarantine(output.file("quarantine.jsonl"), run.tally.bad + run.target_tally.bad)
        for path in run.scoring.files():
            _link(path, output.file(path.name))
        return output.commit(_record("select text --scores-only", run, facts, counts, None))


def _link(path: Path, to: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def _check(count: int | None, fraction: float | None, method: str, name: str, model: DSIR) -> None:
    if (count is None) == (fraction is None):
        raise InputError("give either a count or a fraction")
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"fraction must lie in (0, 1], not {fraction}")
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1, not {count}")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if model.separate_targets and name != "dsir":
        raise InputError(f"separate_targets belongs to the method dsir, not to {name}")


@contextmanager
def _ledger(folder: Path, facts: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[Ledger]:
    """The ledger of a run; removed when the run is done or can never be, kept when it was only interrupted."""
    ledger = Ledger(folder, facts, kinds=KINDS, resume=resume, overwrite=overwrite)
    try:
        yield ledger
    except SalienceError:
        ledger.remove()
        raise
    except BaseException:
        ledger.close()
        raise
    ledger.remove()


def _is_unfinished(out: str | os.PathLike[str], facts: dict[str, Any], run: TextPasses) -> bool:
    """Whether a run was interrupted: then what stands under its output's name is old, or its own without a manifest.

    Raises
    ------
    AlreadyDone
        `out` is what a run with these facts and these input bytes wrote.
    InputError
        It is of another run, or damaged.
    """
    if kept_beside(out).exists() or not exists(out):
        return True
    verified = verify_output(out)
    if not verified.ok:
        raise InputError(
            f"output {out} is not as it was written (salience verify output {out}); --overwrite replaces it"
        )
    manifest = verified.manifest
    changes = list(differences(manifest.get("facts", {}), json.loads(json.dumps(facts))))
    if not changes:
        now = {name: corpus_digest(corpus, run.model.workers) for name, corpus in run.corpora().items()}
        changes = [f"the bytes of {name} have changed" for name in now if now[name] != manifest["digests"][name]]
    if changes:
        raise InputError(f"output {out} is of another run: {some(changes)}. --overwrite replaces it")
    raise AlreadyDone(f"{out} is complete already", manifest)


def _named(part: tuple[Unit, dict[str, np.ndarray]]) -> tuple[pa.Array, np.ndarray]:
    unit, weighed = part
    rows = pa.array(weighed["rows"]).cast(pa.large_string())
    name, colon = (pa.scalar(text, pa.large_string()) for text in (unit.source.name, ":"))
    return pc.binary_join_element_wise(name, rows, colon), weighed["sums"][:, 0]


def _digest(scores: Scores) -> str:
    digest = xxhash.xxh3_128(np.ascontiguousarray(scores.values).tobytes())
    digest.update("\0".join(scores.ids.tolist()).encode())
    return digest.hexdigest()


def _record(
    command: str, run: TextPasses, facts: dict[str, Any], counts: dict[str, int], proof: Proof | None
) -> dict[str, Any]:
    return {
        "command": command, "counts": counts, "proof": proof.as_dict() if proof else None, "facts": facts,
        "digests": run.digests(),
    }  # fmt: skip


def _result(run: TextPasses, out: str) -> TextSelection:
    """Everything there is to tell."""
    chosen: Chosen = run.picks["chosen"]
    eligible = sum(run.eligible.values())
    proof = None
    wordless = [
        name for name, part in run.selections.items() if name not in ("most", "least") and not part.counts.sum()
    ]
    if len(run.held) and wordless:
        run.warnings.append(
            f"the choice was not measured: of the selection by {wordless[0]!r} nothing is left without the copies of "
            "held-out target documents"
        )
    elif len(run.held):
        proof = prove(run.method, run.held, run.raw_counts, run.selections, run.featurizer, run.seed)
        against = [item.better for item in proof.comparisons if item.baseline == "heuristic"]
        if against and all(better is False for better in against):
            run.warnings.append("heuristic classification does better on your target: consider --method heuristic")
    names = np.array([unit.source.name for unit in run.raw.units], dtype=object)[chosen.units]
    taken = dict(zip(*np.unique(names.astype(str), return_counts=True))) if len(names) else {}
    telling = _telling_ngrams(run)
    return TextSelection(
        out=out,
        method=run.method,
        read=run.tally.read,
        selected=len(chosen.rows),
        not_selected=eligible - len(chosen.rows),
        too_short=run.tally.documents - eligible,
        blank=run.tally.blank,
        quarantined=len(run.tally.bad),
        target_documents=run.target_tally.documents,
        target_held_out=len(run.held),
        proof=proof,
        weights=np.concatenate(run.raw_weights),
        chosen_weights=chosen.values,
        sources=[(name, count, int(taken.get(name, 0))) for name, count in run.eligible.items()],
        ngrams_for=telling[0],
        ngrams_against=telling[1],
        most=_shown(run, "most"),
        least=_shown(run, "least"),
        warnings=run.warnings,
    )


def _shown(run: TextPasses, name: str) -> list[tuple[str, float, str]]:
    pick, texts = run.picks[name], run.selections[name]
    text_of = dict(zip(texts.where, texts.strings()))
    order = np.argsort(-pick.values if name == "most" else pick.values, kind="stable")
    shown = []
    for at in order:
        source = run.raw.units[pick.units[at]].source.name
        text = text_of[(source, int(pick.rows[at]))]
        shown.append((f"{source}:{pick.rows[at]}", float(pick.values[at]), text[:2000]))
    return shown


def _telling_ngrams(run: TextPasses) -> tuple[list[tuple[str, float, int, int]], list[tuple[str, float, int, int]]]:
    """The n-grams of a keyed sample that speak most for the (first) target, and against it."""
    if run.model.tokenizer is not None:
        return [], []
    found: dict[str, list[int]] = {}
    for side, texts in enumerate((run.raw_sample, run.fitted)):
        for text in texts.strings()[:200]:
            for gram in ngram_strings(tokenize(text), run.model.ngrams):
                found.setdefault(gram, [0, 0])[side] += 1
    common = [(gram, *counts) for gram, counts in found.items() if sum(counts) >= 5 and len(gram) <= 60]
    if not common:
        return [], []
    buckets = run.featurizer([gram for gram, _, _ in common])
    ratios = run.model.log_diff_[0][buckets.ids[buckets.offsets[1:] - 1]]  # the whole n-gram is its last entry
    raw, target = np.array([counts for _, *counts in common]).T
    up, down = (np.argsort(-sign * ratios * side, kind="stable")[:TELLING] for sign, side in ((1, target), (-1, raw)))
    rows = [(gram, float(ratio), *counts) for (gram, *counts), ratio in zip(common, ratios)]
    return [rows[i] for i in up if ratios[i] > 0], [rows[i] for i in down if ratios[i] < 0]
