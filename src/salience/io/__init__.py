"""The one reader and the one writer of corpora and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.io.corpus import Corpus, Source, Unit
    from salience.io.engine import available_cores, connect_ray, map_units
    from salience.io.keys import gumbel, key_of, uniform
    from salience.io.ledger import Ledger
    from salience.io.lines import Bad
    from salience.io.output import Output, checksum
    from salience.io.reader import Batch, peek, read
    from salience.io.tables import TableBatch, TableReader, as_numbers
    from salience.io.tally import Tally
    from salience.io.verify import Verification, verify_output
    from salience.io.writer import RecordWriter, records_of, write_quarantine

_WHERE: dict[str, str] = {
    "Corpus": "corpus", "Source": "corpus", "Unit": "corpus",
    "available_cores": "engine", "connect_ray": "engine", "map_units": "engine",
    "gumbel": "keys", "key_of": "keys", "uniform": "keys",
    "Ledger": "ledger",
    "Bad": "lines",
    "Output": "output", "checksum": "output",
    "Batch": "reader", "peek": "reader", "read": "reader",
    "TableBatch": "tables", "TableReader": "tables", "as_numbers": "tables",
    "Tally": "tally",
    "Verification": "verify", "verify_output": "verify",
    "RecordWriter": "writer", "records_of": "writer",
    "write_quarantine": "writer",
}  # fmt: skip
__all__ = [
    "Bad",
    "Batch",
    "Corpus",
    "Ledger",
    "Output",
    "RecordWriter",
    "Source",
    "TableBatch",
    "TableReader",
    "Tally",
    "Unit",
    "Verification",
    "as_numbers",
    "available_cores",
    "checksum",
    "connect_ray",
    "gumbel",
    "key_of",
    "map_units",
    "peek",
    "read",
    "records_of",
    "uniform",
    "verify_output",
    "write_quarantine",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
