"""Choose documents from a corpus of any size by a target, write them, and measure on the user's own data if it helped.

`TextPasses` reads the targets (a keyed part of them held out), counts, weighs and draws the raw corpus, and copies the
chosen records; it also draws what the choice is compared with: random documents several times, and heuristic
classification. `prove` measures them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from salience.data.dsir.features import ngram_strings, tokenize
from salience.data.dsir.resample import Chosen
from salience.data.dsir.weights import DSIR
from salience.data.proof import Proof, prove
from salience.data.text_passes import Progress, TextPasses
from salience.errors import InputError
from salience.io import Corpus, Output, RecordWriter, Tally, read, write_quarantine
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
    def equation(self) -> str:
        """The conservation equation, in words."""
        return (
            f"{self.read:,} records read = {self.selected:,} selected + {self.not_selected:,} not selected + "
            f"{self.too_short:,} too short + {self.blank:,} blank + {self.quarantined:,} quarantined"
        )


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
    top_k: bool = False,
    hold_out: float = 0.2,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TextSelection:
    """Choose documents of `raw` that are like `targets` and write their records to `out`.

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
    top_k : bool
        Take the largest scores, without noise.
    hold_out : float
        Share of the target documents kept out of the fit to measure on; 0 for none.
    overwrite : bool
        Replace an existing output.
    progress : callable, optional
        Called with (stage, bytes done, bytes in all).

    Raises
    ------
    InputError, DataError, NothingToDo
        With nothing left under the output's name.
    """
    run = TextPasses(raw, targets, model or DSIR(), method, scores, top_k, hold_out, progress)
    if (count is None) == (fraction is None):
        raise InputError("give either a count or a fraction")
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"fraction must lie in (0, 1], not {fraction}")
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1, not {count}")
    with Output(out, overwrite, [raw, *targets]) as output:
        writer = RecordWriter(output.file(), os.path.basename(out), raw)
        run.read_targets()
        run.survey()
        run.fit()
        run.draw(count if count is not None else max(1, round((fraction or 0) * run.tally.documents)))
        run.copy(writer)
        if run.tally.bad or run.target_tally.bad:
            write_quarantine(output.file(".quarantine.jsonl"), run.tally.bad + run.target_tally.bad)
        result = _result(run, os.fspath(out))
        result.manifest = output.commit(_record(result, raw, targets, run))
    return result


def score_text(raw: Corpus, targets: Sequence[Corpus], model: DSIR | None = None) -> Scores:
    """Log importance weight of every raw document as `Scores`; ids are "file:row".

    Raises
    ------
    InputError
        `model` keeps several targets apart: then there is no single weight.
    """
    model = model or DSIR()
    if not targets:
        raise InputError("a target is needed")
    if model.separate_targets and len(targets) > 1:
        raise InputError("scores of separate targets are several per document; score one target at a time")
    pooled = Corpus.joined(targets)
    model.fit(raw, pooled)
    ids, tally = [], Tally()
    for unit in raw.units:
        for batch in read(raw, unit):
            ids += [f"{batch.source.name}:{row}" for row in batch.rows.tolist()]
            tally.add(batch, model.max_bad)
    counts = {"read": tally.read, "scored": len(ids), "blank": tally.blank, "quarantined": len(tally.bad)}
    provenance = {"method": "dsir", "parameters": model.described(), "counts": counts}
    return Scores(model.log_weights(raw)[:, 0], ids, "sample", provenance)


def _record(result: TextSelection, raw: Corpus, targets: Sequence[Corpus], run: TextPasses) -> dict[str, Any]:
    counts = {name: getattr(result, name) for name in
              ("read", "selected", "not_selected", "too_short", "blank", "quarantined")}  # fmt: skip
    return {
        "command": "select text",
        "method": result.method,
        "parameters": {**run.model.described(), "top_k": run.top_k, "hold_out": run.hold_out},
        "raw": [{"file": source.name, "bytes": source.size} for source in raw.sources],
        "targets": [{"file": source.name, "bytes": source.size} for target in targets for source in target.sources],
        "counts": counts,
        "proof": result.proof.as_dict() if result.proof else None,
    }


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
