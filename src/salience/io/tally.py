"""What became of every record: read = documents + blank + quarantined."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from salience.errors import DataError, NothingToDo
from salience.io.lines import Bad
from salience.io.reader import Batch

if TYPE_CHECKING:
    from salience.io.tables import TableBatch


@dataclass
class Tally:
    """Counts of the records of a corpus, and the bad ones themselves.

    Attributes
    ----------
    documents, blank : int
        Records with a text, and blank lines.
    bad : list of (str, Bad)
        Records set aside, with the file of each.
    """

    documents: int = 0
    blank: int = 0
    bad: list[tuple[str, Bad]] = field(default_factory=list)

    @property
    def read(self) -> int:
        """All records read."""
        return self.documents + self.blank + len(self.bad)

    @property
    def quarantined(self) -> int:
        """Number of records set aside."""
        return len(self.bad)

    def add(self, batch: Batch | TableBatch, max_bad: float) -> None:
        """Count a batch; with ``max_bad == 0`` the first bad record stops the run."""
        self.documents += len(batch)
        self.blank += batch.blank
        self.bad += [(batch.source.path or batch.source.name, bad) for bad in batch.bad]
        if self.bad and max_bad == 0:
            raise DataError(f"bad record in {_first(self.bad)}")

    def merge(self, other: Tally) -> None:
        """Add the counts of another unit."""
        self.documents += other.documents
        self.blank += other.blank
        self.bad += other.bad

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for a ledger."""
        return {"documents": self.documents, "blank": self.blank, "bad": [[file, *bad] for file, bad in self.bad]}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Tally:
        """What `state` was taken of."""
        return cls(state["documents"], state["blank"], [(file, Bad(*bad)) for file, *bad in state["bad"]])

    def check(self, max_bad: float, what: str) -> None:
        """Refuse a corpus with too many bad records, or with no document at all.

        Raises
        ------
        DataError
            More than the share `max_bad` of the records is bad.
        NothingToDo
            There is no document.
        """
        share = len(self.bad) / max(self.read, 1)
        if share > max_bad:
            reasons = Counter(bad.reason for _, bad in self.bad).most_common(2)
            shown = "; ".join(f"{count} x {reason}" for reason, count in reasons)
            raise DataError(
                f"{len(self.bad)} of {self.read} records of the {what} are bad ({share:.1%}, more than --max-bad "
                f"{max_bad:.1%}): {shown}; first in {_first(self.bad)}"
            )
        if not self.documents:
            raise NothingToDo(f"the {what} holds no document")


def _first(bad: list[tuple[str, Bad]]) -> str:
    file, record = bad[0]
    return f"{file} at {record.offset}: {record.reason}"
