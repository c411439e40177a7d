"""Small corpora for the tests of text selection: two kinds of made-up prose that share some words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from salience.data import DSIR, select_text
from salience.io import Corpus

COMMON = ["the", "of", "and", "a", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with"]
SEA = [
    "wave",
    "tide",
    "harbour",
    "anchor",
    "sail",
    "reef",
    "gull",
    "salt",
    "net",
    "mast",
    "rope",
    "storm",
    "fish",
    "deck",
    "captain",
]
LAW = [
    "court",
    "judge",
    "statute",
    "appeal",
    "clause",
    "ruling",
    "party",
    "claim",
    "contract",
    "duty",
    "witness",
    "motion",
    "brief",
    "bench",
    "writ",
]


def prose(kind: Sequence[str], documents: int, seed: int, tokens: tuple[int, int] = (12, 40)) -> list[str]:
    """Documents of random words, half of them common ones; every document ends in a word of its own."""
    generator = np.random.default_rng(seed)
    texts = []
    for number in range(documents):
        length = int(generator.integers(*tokens)) - 1
        words = np.where(
            generator.random(length) < 0.5, generator.choice(COMMON, length), generator.choice(kind, length)
        )
        texts.append(" ".join([*words, f"end{seed}x{number}"]))
    return texts


def jsonl(path: Path, texts: Sequence[str], **fields: object) -> Path:
    """Write texts as JSON lines, each with these fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_pool(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """``raw/`` of three files (90 documents on law, 45 at sea), and ``target.jsonl`` (60 at sea)."""
    law, sea = prose(LAW, 90, seed), prose(SEA, 45, seed + 1)
    mixed = [text for triple in zip(law[::2], law[1::2], sea) for text in triple]
    for number, name in enumerate(("a", "b", "sub/c")):
        jsonl(folder / "raw" / f"{name}.jsonl", mixed[number::3], part=number)
    return folder / "raw", jsonl(folder / "target.jsonl", prose(SEA, 60, seed + 2))


def texts_of(path: Path) -> list[str]:
    """The texts of a JSON-lines file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def share_of(kind: Sequence[str], texts: Sequence[str]) -> float:
    """Share of the texts that hold a word of a kind."""
    return float(np.mean([bool(set(kind) & set(text.split())) for text in texts]))


def model(**options: object) -> DSIR:
    return DSIR(**{"num_buckets": 500, "min_tokens": 5, "smoothing": 0.1, "workers": 1, **options})


def select(raw: object, target: object, out: Path, settings: DSIR | None = None, **options: object):
    targets = target if isinstance(target, list) else [target]
    return select_text(Corpus(raw), [Corpus(name) for name in targets], out, model=settings or model(), **options)


def accounted(result) -> bool:
    parts = result.selected + result.not_selected + result.too_short + result.blank + result.quarantined
    return parts == result.read and f"{result.read:,} records read = {result.selected:,} selected" in result.equation
