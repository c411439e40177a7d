"""The report of `rank table`: the proof first, then the ranking, redundancy, and the state of the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.features.outrank.proof import RankProof
    from salience.features.outrank.report import RankReport

_BARS = 25
_LEAVES = 40
_COLUMNS = 100  # rows of a table
_PAIRS = 20


def write_page(result: RankReport, proof: RankProof | None, path: Path) -> None:
    """Write the page."""
    from salience import report
    from salience.report import figures

    rows = result.singles.to_pylist()
    blocks: list[Any] = [_verdict(report, proof), report.facts(_facts(result, rows))]
    if proof is not None:
        blocks += _proof(report, figures, proof)
    blocks += _ranking(report, figures, result, rows)
    if result.aggregated.num_rows:
        blocks += _combinations(report, figures, result, rows) + _aggregated(report, result)
    if result.pairs.num_rows and len(result.features) > 1:
        blocks += _redundancy(report, figures, result, rows)
    blocks += _quality(report, result)
    if result.warnings:
        blocks += [report.heading("Notes"), *(report.text(warning) for warning in result.warnings)]
    settings = "\n".join(f"{name}: {value}" for name, value in result.settings.items())
    blocks += [report.heading("How it was made"), report.code(settings)]
    report.page(f"What tells about {result.label}", blocks, path=path, subtitle=result.equation)


def _verdict(report, proof: RankProof | None):
    if proof is None:
        return report.verdict("not measured", "No rows were held out, or they say nothing; see the notes.", None)
    label = {
        True: "better than random columns",
        False: "worse than random columns",
        None: "no better than random columns",
    }
    return report.verdict(label[proof.better], proof.verdict, proof.better)


def _facts(result: RankReport, rows: list[dict[str, Any]]) -> dict[str, object]:
    facts: dict[str, object] = {
        "rows scored": result.counts["scored"],
        "batches": result.batches,
        "columns": len(result.features),
        "label's entropy (nats)": result.label_entropy,
    }
    if any(row["kind"] == "control" for row in rows):
        noise = result.noise()
        facts["columns above noise"] = sum(row["kind"] == "column" and row["score"] > noise for row in rows)
    pairs, combinations = result.exist
    for name, exist, scored in (
        ("pairs", pairs, result.pairs.num_rows),
        ("combinations", combinations, sum(row["kind"] == "combination" for row in rows)),
    ):
        if exist:
            facts[f"{name} scored"] = f"{scored:,} of {exist:,}"
    return facts


def _proof(report, figures, proof: RankProof) -> list[Any]:
    losses = [item for item in proof.comparisons if item.measure == "log loss"]
    k = proof.k
    return [
        report.heading("Measured on rows that no score has seen"),
        report.figure(
            lambda ax: figures.bars(
                ax, [f"against {item.baseline}" for item in losses], [item.difference for item in losses],
                [(item.low, item.high) for item in losses], xlabel="log loss better by (nats a row)",
            ),
            f"How much better a logistic regression does on the {k} best columns than on {k} random ones, on the {k} "
            "best by plain mutual information, and on all; with 95 % intervals, right of 0 is better.",
            height=1.1 + 0.3 * len(losses),
        ),
        report.table(
            ("measure", "against", f"best {k}", "baseline", "better by", "95 % interval"),
            [
                (item.measure, item.baseline, item.chosen, item.other, item.difference, f"{item.low:+.4f} … {item.high:+.4f}")
                for item in proof.comparisons
            ],
            f"Trained on {proof.rows[0]:,} rows, measured on {proof.rows[1]:,}. Random is the mean of several draws; its "
            f"interval counts their spread. Always naming the most frequent class: accuracy "
            f"{proof.accuracy['majority']:.4f}, log loss of the class shares {proof.log_loss['majority']:.4f}.",
        ),
        report.table(("chosen by", "columns"), [(name, ", ".join(proof.columns[name])) for name in proof.columns if name in ("outrank", "plain MI", "3MR")]),
    ]  # fmt: skip


def _ranking(report, figures, result: RankReport, rows: list[dict[str, Any]]) -> list[Any]:
    columns = [row for row in rows if row["kind"] == "column"]
    noise = [row for row in rows if row["kind"] == "control"]
    drawn = [row for row in noise if row["feature"] != "CONTROL-target"]  # as long as the label's entropy
    shown = sorted([*columns[:_BARS], *drawn], key=lambda row: -row["score"])
    caption = f"The {min(_BARS, len(columns))} best of {len(columns)} columns"
    caption += "; whiskers are quartiles over batches." if result.batches > 1 else "."
    if noise:
        caption += (
            " Controls are grey: noise of several cardinalities, and the whole row as one value. The dashed line is "
        )
        caption += "the best noise: what does not reach beyond it tells no more than noise does."
    head = ("column", "kind", "score", "normalised", "plain MI", "entropy", "batches")
    cells = [
        (row["feature"], row["kind"], row["score"], row["normalised"], row["plain"], row["entropy"], row["batches"])
        for row in sorted([*columns[:_COLUMNS], *noise], key=lambda row: -row["score"])
    ]
    return [
        report.heading("Ranking"),
        report.figure(
            lambda ax: figures.bars(
                ax, [row["feature"] for row in shown], [row["score"] for row in shown],
                [(row["low"], row["high"]) for row in shown] if result.batches > 1 else None,
                highlight=[row["feature"] for row in shown if row["kind"] == "column"],
                limit=result.noise() if noise else None, xlabel="I(f; y) less that of noise (nats)",
            ),
            caption,
            height=1.1 + 0.27 * len(shown),
        ),
        report.table(head, cells, "Scores are medians over batches; normalised: smallest 0, the label's entropy 1."),
    ]  # fmt: skip


def _combinations(report, figures, result: RankReport, rows: list[dict[str, Any]]) -> list[Any]:
    best = [row for row in rows if row["kind"] == "combination"][:_BARS]
    alone = {row["feature"]: row["score"] for row in rows if row["kind"] == "column"}
    parts = [[alone[name] for name in row["feature"].split(" AND ")] for row in best]
    cells = [
        (row["feature"], row["score"], max(part), row["score"] - max(part), row["batches"])
        for row, part in zip(best, parts)
    ]
    return [
        report.heading("Combinations"),
        report.figure(
            lambda ax: figures.change(
                ax, [row["feature"] for row in best], [max(part) for part in parts], [row["score"] for row in best],
                ("best column of it alone", "combination"), xlabel="score (nats)",
            ),
            "The best combinations, and what the better of their columns tells alone.",
            height=1.1 + 0.27 * len(best),
        ),
        report.table(("combination", "score", "best column alone", "gain", "batches"), cells),
    ]  # fmt: skip


def _aggregated(report, result: RankReport) -> list[Any]:
    rows = [(row["feature"], row["score"], row["combinations"]) for row in result.aggregated.to_pylist()[:_BARS]]
    caption = "Median score of all combinations that a column is part of."
    return [report.heading("Columns in combination"), report.table(("column", "score", "combinations"), rows, caption)]


def _redundancy(report, figures, result: RankReport, rows: list[dict[str, Any]]) -> list[Any]:
    best = [row["feature"] for row in rows if row["kind"] == "column"][:_LEAVES]
    tree, names = result.tree(best)
    groups = [group for group in result.clusters() if len(group) > 1][:_PAIRS]
    blocks = [
        report.heading("Redundancy"),
        report.figure(
            lambda ax: figures.dendrogram(ax, tree, names, xlabel="1 − redundancy", limit=0.5),
            f"Which of the {len(names)} best columns tell the same: those that join far left do. Redundancy is a pair's "
            "score over the smaller of the two entropies; complete linkage.",
            height=1.1 + 0.22 * len(names),
        ),
    ]
    if groups:
        shown = [(len(group), ", ".join(group)) for group in groups]
        blocks.append(report.table(("columns", "that tell the same"), shown, "Groups of redundancy above 0.5."))
    blocks.append(
        report.text(
            "In the order of 3MR, where every next column is the most relevant, least redundant with those before, and in "
            f"best relation with them: {', '.join(result.three_mr()[:_LEAVES])}."
        )
    )
    return blocks


def _quality(report, result: RankReport) -> list[Any]:
    rows = [
        (
            row["column"], row["coverage"], ("" if row["exact"] else "≈ ") + f"{row['cardinality']:,}", row["rare"],
            row["bytes"], row["min"], row["median"], row["max"],
        )
        for row in sorted(result.quality.to_pylist(), key=lambda row: row["coverage"])[:_COLUMNS]
    ]  # fmt: skip
    columns = ("column", "coverage %", "values", "seen once", "bytes", "min", "median", "max")
    counted = result.rows.column_names
    by_label = [tuple(row.values()) for row in result.rows.to_pylist()[:_BARS]]
    return [
        report.heading("Quality of the data"),
        report.table(
            columns, rows,
            "Worst covered first. Values: distinct ones that are not missing, exact up to 65,536 and estimated beyond; "
            "the median is that of a sample.",
            align=("left", *["right"] * 7),
        ),
        report.table(
            [name.replace("_", " ") for name in counted], by_label,
            f"Rows by value of {result.label}, in a sample: share of fields that are missing, 0, or long, and the entropy of a "
            "row's characters.",
        ),
    ]  # fmt: skip
