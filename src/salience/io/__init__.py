"""The one reader and the one writer of corpora and tables."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.io.corpus import Corpus, Source, Unit
    from salience.io.engine import available_cores, map_units
    from salience.io.folder import OutputFolder
    from salience.io.keys import gumbel, key_of, uniform
    from salience.io.lines import Bad
    from salience.io.reader import Batch, peek, read
    from salience.io.tally import Tally
    from salience.io.writer import Output, RecordWriter, checksum, write_quarantine

_WHERE = {
    "Corpus": "corpus", "Source": "corpus", "Unit": "corpus",
    "Batch": "reader", "read": "reader", "peek": "reader",
    "Tally": "tally", "Bad": "lines",
    "map_units": "engine", "available_cores": "engine",
    "Output": "writer", "RecordWriter": "writer", "checksum": "writer", "write_quarantine": "writer",
    "OutputFolder": "folder",
    "uniform": "keys", "gumbel": "keys", "key_of": "keys",
}  # fmt: skip
__all__ = [
    "Bad",
    "Batch",
    "Corpus",
    "Output",
    "OutputFolder",
    "RecordWriter",
    "Source",
    "Tally",
    "Unit",
    "available_cores",
    "checksum",
    "gumbel",
    "key_of",
    "map_units",
    "peek",
    "read",
    "uniform",
    "write_quarantine",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
