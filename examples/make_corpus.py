"""Write the demo's corpus: real text that every machine has.

    raw/stdlib.jsonl, raw/numpy.jsonl, …   the standard library's source, and docstrings of installed packages
    target.jsonl                           part of scipy's docstrings; another part is hidden in raw/scipy.jsonl

Usage: python examples/make_corpus.py FOLDER
"""

import json
import sys
from pathlib import Path

from salience.reproductions.worlds.text import Document, pool


def write(path: Path, documents: list[Document]) -> None:
    """Write documents as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            record = {"text": document.text, "source": f"{document.source}/{document.path}"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(folder: Path) -> None:
    """Write raw/ and target.jsonl below `folder`."""
    corpus = pool(seed=0, single_spaces=True)
    for source in sorted({document.source for document in corpus.raw}):
        write(folder / "raw" / f"{source}.jsonl", [item for item in corpus.raw if item.source == source])
    write(folder / "target.jsonl", corpus.target)
    print(f"{len(corpus.raw):,} raw documents and {len(corpus.target):,} of the target in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
