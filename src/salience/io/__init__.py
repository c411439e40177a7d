"""The one reader and the one writer of corpora and tables."""

from salience._lazy import exports

_WHERE = {
    "Corpus": "corpus", "Source": "corpus", "Unit": "corpus",
    "Batch": "reader", "read": "reader", "peek": "reader",
    "Tally": "tally", "Bad": "lines",
    "map_units": "engine", "available_cores": "engine",
    "Output": "writer", "RecordWriter": "writer", "checksum": "writer", "write_quarantine": "writer",
    "uniform": "keys", "gumbel": "keys", "key_of": "keys",
}  # fmt: skip
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
